"""Communication between processes besides gradients and metrics: one small all-reduce per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ablab.tasks.async_copy import AsyncCopy


class StepAllReduce:
    """All-reduce of the loss and of per-rank flags such as "stop" and "save", overlapped with the backward pass.

    Flags are named functions, the same in every process. A flag that any process raises in a step is set for all
    processes after that step. Without distributed training, flags are read directly.
    """

    def __init__(self) -> None:
        self.flags: dict[str, Callable[[], bool]] = {}
        self.sums: Tensor | None = None
        self.work: Any = None
        self.counts: AsyncCopy | None = None

    def begin(self, loss: Tensor) -> None:
        """Start the all-reduce of this process's loss, a scalar, and its flags."""
        if is_distributed():
            flags = [float(flag()) for flag in self.flags.values()]
            self.sums = torch.cat([loss.double()[None], loss.new_tensor(flags, dtype=torch.float64)])
            self.work = dist.all_reduce(self.sums, async_op=True)

    def end(self, loss: Tensor) -> Tensor:
        """Wait for the all-reduce and return the mean loss over processes."""
        if self.sums is None:
            return loss
        if self.work is not None:
            self.work.wait()
            self.work = None  # cannot be copied, and diagnostics deepcopy the task
            self.counts = AsyncCopy(self.sums[1:])
        return (self.sums[0] / dist.get_world_size()).to(loss.dtype)

    def reduced_flags(self) -> dict[str, bool]:
        """Return the flags that any process raised in the last step; all False before the first step."""
        if not is_distributed():
            return {name: flag() for name, flag in self.flags.items()}
        counts = [0.0] * len(self.flags) if self.counts is None else self.counts.values()
        return {name: count > 0 for name, count in zip(self.flags, counts, strict=True)}


class AllGather(torch.autograd.Function):
    """Differentiable all-gather of rows: gradients are sent back to the process of each row.

    Every process must have the same number of rows. torch's version, in `torch.distributed.nn`, is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        everywhere = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, rows.contiguous())
        return torch.cat(everywhere)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def any_rank(here: bool, device: torch.device) -> bool:
    """Return whether a flag is set in any process."""
    if not is_distributed():
        return here
    found = torch.tensor(int(here), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
