"""What the processes of a run tell each other, beside gradients and metrics: one small sum in each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ablab.tasks.arriving import Arriving


class Exchange:
    """The mean loss of all processes, and whether any of them wishes something; summed during the backward pass.

    Wishes are named functions, the same ones in every process. What one process wishes in a step is granted to all
    after it; a process that is alone has its wishes at once.
    """

    def __init__(self) -> None:
        self.wishes: dict[str, Callable[[], bool]] = {}
        self.sums: Tensor | None = None
        self.work: Any = None
        self.counts: Arriving | None = None

    def begin(self, loss: Tensor) -> None:
        """Send this process's loss, a scalar, and its wishes."""
        if several():
            wishes = [float(wish()) for wish in self.wishes.values()]
            self.sums = torch.cat([loss.double()[None], loss.new_tensor(wishes, dtype=torch.float64)])
            self.work = dist.all_reduce(self.sums, async_op=True)

    def end(self, loss: Tensor) -> Tensor:
        """The mean of the losses of all processes."""
        if self.sums is None:
            return loss
        if self.work is not None:
            self.work.wait()
            self.work = None  # it cannot be copied, as measures copy a task
            self.counts = Arriving(self.sums[1:])
        return (self.sums[0] / dist.get_world_size()).to(loss.dtype)

    def granted(self) -> dict[str, bool]:
        """What any process wished in the last step; nothing before the first."""
        if not several():
            return {name: wish() for name, wish in self.wishes.items()}
        counts = [0.0] * len(self.wishes) if self.counts is None else self.counts.values()
        return {name: count > 0 for name, count in zip(self.wishes, counts, strict=True)}


class AllGather(torch.autograd.Function):
    """Gather the rows of all processes; gradients return to the process that a row is from.

    Every process has the same number of rows. torch's own, of `torch.distributed.nn`, is deprecated.
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


def in_any(here: bool, device: torch.device) -> bool:
    """Whether something is so in any process."""
    if not several():
        return here
    found = torch.tensor(int(here), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
