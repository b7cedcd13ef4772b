"""Numbers on their way from an accelerator to the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arriving:
    """The values of a small tensor, which the CPU can ask for later without waiting for what was begun since.

    Args:
        tensor: where it is now; it is not to be changed in place.
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
        return {"copy": self.copy, "done": None}  # an event cannot be copied, and measures copy a task

    def values(self) -> list[float]:
        """The values, as soon as they are there."""
        if self.done is not None:
            self.done.synchronize()
        values: list[float] = self.copy.tolist()
        return values
