"""Asynchronous device-to-host copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AsyncCopy:
    """An asynchronous copy of a small tensor to the CPU, which does not block later work on the GPU.

    Args:
        tensor: the tensor to copy; must not be modified in place afterwards.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().to("cpu", non_blocking=True)
        self.done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self.done = torch.cuda.Event()
            self.done.record()

    def __getstate__(self) -> dict[str, Any]:
        if self.done is not None:
            self.done.synchronize()
        return {"copy": self.copy, "done": None}  # events cannot be copied, and diagnostics deepcopy the task

    def values(self) -> list[float]:
        """Wait for the copy to complete and return its values."""
        if self.done is not None:
            self.done.synchronize()
        values: list[float] = self.copy.tolist()
        return values
