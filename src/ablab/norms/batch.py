"""Batch norm: statistics over the batch while training, over their running averages afterwards.

What is called synchronized, ghost, mean-only, frozen batch norm and batch renorm are settings of one class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.norms.layer import WITHOUT_POSITIONS, Layout, NormLayer, Statistic, moments
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization, precise


class BatchNorm(Norm):
    """Batch normalization: zero mean and unit variance of each feature over the batch and all positions.

    y = (x − mean) / sqrt(var + eps) · gamma + beta. Training normalizes by the batch's own mean and biased variance and
    averages them (the variance unbiased) for evaluation: running ← (1 − momentum) · running + momentum · batch.
    Inside a recurrence the statistics are kept for each time step, and gamma starts at `recurrent_gain`.

    With a mask, statistics that fewer than two valid values make up are taken from the running averages.

    Args:
        momentum: the share of the newest batch in the running averages.
        recurrent_gain: where gamma starts inside a recurrence; 1 would saturate the gates (Cooijmans et al.).
        sync: take the statistics over the batches of all processes.
        ghost_batch_size: take them over each so many samples of a batch (ghost batch norm); None over all of them.
        mean_only: subtract the mean, divide by nothing, and learn a shift only (Salimans & Kingma).
        r_max, d_max: batch renorm corrects the batch's statistics towards the running ones, by a factor of at most
            `r_max` and a shift of at most `d_max`; 1 and 0 are batch norm.
        renorm_start, renorm_end: both bounds grow from 1 and 0 between these training steps.
        frozen: normalize by the stored averages in training too, and learn neither gain nor shift.
        affine, eps, weight: see `Norm`.

    Raises:
        ValueError: settings out of range, or that exclude each other.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
        Inside a recurrence: Cooijmans et al. 2016, https://arxiv.org/abs/1603.09025
        Mean-only: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868
        Renorm: Ioffe 2017, https://arxiv.org/abs/1702.03275; here the variance is averaged, there its root
        Ghost: Hoffer et al. 2017, https://arxiv.org/abs/1705.08741
    """

    def __init__(
        self,
        *,
        momentum: float = 0.1,
        recurrent_gain: float = 0.1,
        sync: bool = False,
        ghost_batch_size: int | None = None,
        mean_only: bool = False,
        r_max: float = 1.0,
        d_max: float = 0.0,
        renorm_start: int = 0,
        renorm_end: int = 0,
        frozen: bool = False,
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum}: a share of the newest batch is needed, more than 0 and at most 1")
        if ghost_batch_size is not None and ghost_batch_size < 1:
            raise ValueError(f"ghost_batch_size={ghost_batch_size}: at least one sample is needed, or null for all")
        if r_max < 1 or d_max < 0:
            raise ValueError(
                f"r_max={r_max}, d_max={d_max}: bounds of at least 1 and 0 are needed; those are no renorm"
            )
        if not 0 <= renorm_start <= renorm_end:
            raise ValueError(f"renorm_start={renorm_start}, renorm_end={renorm_end}: steps from 0 on, in this order")
        self.renorm = renorm = r_max > 1 or d_max > 0
        if sync and ghost_batch_size is not None:
            raise ValueError(
                f"ghost_batch_size={ghost_batch_size}, sync=true: one narrows the batch that is seen, the other widens "
                "it; set one of them"
            )
        if mean_only and renorm:
            raise ValueError(
                f"mean_only=true, r_max={r_max}, d_max={d_max}: renorm corrects a division; set one of them"
            )
        if frozen and (sync or ghost_batch_size is not None or renorm):
            raise ValueError("frozen=true: no batch is looked at, so sync, ghost_batch_size and renorm must be off")
        self.momentum = momentum
        self.recurrent_gain = recurrent_gain
        self.sync = sync
        self.ghost_batch_size = ghost_batch_size
        self.mean_only = mean_only
        self.r_max, self.d_max = r_max, d_max
        self.renorm_start, self.renorm_end = renorm_start, renorm_end
        self.frozen = frozen

    @property
    def has_gain(self) -> bool:
        return self.affine and not self.mean_only

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        name = "mean" if self.mean_only else "mean and variance"
        if self.frozen:
            return (Statistic(name, source="stored"),)
        return (Statistic(name, batch=self.batch, positions=layout not in WITHOUT_POSITIONS, source="running"),)

    @property
    def batch(self) -> str:
        """The samples that are seen together, in words."""
        if self.sync:
            return "the batches of all processes"
        return "each ghost batch" if self.ghost_batch_size else "the batch"

    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> NormLayer:
        return BatchNormLayer(self, num_features, layout, num_steps=num_steps, activation=activation)

    def batch_seen(self, micro_batch: int, world_size: int) -> int:
        if self.frozen:
            return 1
        return min(self.ghost_batch_size or micro_batch, micro_batch) * (world_size if self.sync else 1)


class BatchNormLayer(NormLayer):
    """Batch norm of one layout; see `BatchNorm` for the formula and `NormLayer` for the shapes.

    The running averages stay in float32 at least, whatever dtype the rest is brought to: in bfloat16 they would not
    move. In a recurrence they are `(num_steps, C)`, gain and shift are shared by all steps.

    Raises:
        ValueError: in training, when one statistic would be taken over a single value; a step beyond `num_steps`.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    buffer_names = ("running_mean", "running_var")

    def __init__(
        self,
        norm: BatchNorm,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        gain = norm.recurrent_gain if layout == "recurrence" else 1.0
        super().__init__(norm, num_features, layout, gain=gain, activation=activation)
        self.norm = norm
        self.num_steps = num_steps
        self.pooled: Tensor | None = None  # how many values are in the averages, while `recalibrate` pools them
        size = (num_features,) if num_steps is None else (num_steps, num_features)
        self.register_buffer("running_mean", torch.zeros(size, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(size, dtype=torch.float32))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        if norm.frozen:
            self.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> BatchNormLayer:
        before = {name: getattr(self, name) for name in self.buffer_names}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, buffer.to(now.device, torch.float32))
        return self

    @property
    def learning(self) -> bool:
        """Whether the batch's own statistics count, and are averaged."""
        return self.training and not self.norm.frozen

    def samples(self, batch: int, num_processes: int | None) -> int:
        ghost = self.norm.ghost_batch_size
        if ghost is not None and batch > ghost:
            return batch % ghost or ghost  # the last ghost batch is the smallest
        return batch * (num_processes or world_size()) if self.norm.sync else batch

    # One ghost batch after another -----------------------------------------------------------------------------

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        if not self.learning:
            return self.by_averages(x, valid, step)
        if not step and self.pooled is None:  # once a sequence
            self.num_batches_tracked.add_(1)
        ghost = self.norm.ghost_batch_size
        if ghost is None or len(x) <= ghost:
            return self.by_batch(x, valid, step)
        parts = x.split(ghost)
        masks = [None] * len(parts) if valid is None else valid.split(ghost)
        return torch.cat([self.by_batch(part, mask, step) for part, mask in zip(parts, masks, strict=True)])

    def by_averages(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        """Normalized by the running averages, which stay as they are."""
        if self.torch_has_it:
            return self.torchs(x, step, training=False)
        mean, var = self.running(self.running_mean, x, step), self.running(self.running_var, x, step)
        return self.formula(precise(x), mean, var, self.mask(valid))

    def by_batch(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        """Normalized by the batch's own statistics, which move the running averages."""
        together = self.norm.sync and world_size() > 1
        if self.torch_has_it and valid is None and self.pooled is None and not together and not self.norm.renorm:
            return self.torchs(x, step, training=True)
        x, mask = precise(x), self.mask(valid)
        mean, var, count = seen = moments(x, self.dims(x), mask)
        if together:
            mean, var, count = seen = over_processes(*seen)
        running_mean, running_var = self.running(self.running_mean, x, step), self.running(self.running_var, x, step)
        if mask is not None:  # a statistic of fewer than two values says nothing
            mean = torch.where(count > 1, mean, running_mean)
            var = torch.where(count > 1, var, running_var)
        r, d, pooled = None, None, None
        if self.pooled is not None:
            pooled = self.running(self.pooled, x, step)
        elif self.norm.renorm:
            r, d = self.correction(mean, var, running_mean, running_var)
        average(running_mean, running_var, *seen, momentum=self.norm.momentum, pooled=pooled)
        return self.formula(x, mean, var, mask, r, d)

    def mask(self, valid: Tensor | None) -> Tensor | None:
        """`valid` in the shape that broadcasts it against an input."""
        return None if valid is None else valid.unsqueeze(-1)

    def dims(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions that one statistic is taken over."""
        if self.layout == "image":
            return (0, *range(2, x.dim()))
        return (0,) if self.layout in WITHOUT_POSITIONS else (0, 1)

    def running(self, averages: Tensor, x: Tensor, step: int | None) -> Tensor:
        """The part of running averages that belongs to `x`, as it broadcasts against it: a view to be written to."""
        if self.num_steps is None:
            return self.beside(averages, x)
        first, last = (0, x.shape[1]) if step is None else (step, step + 1)
        if last > self.num_steps:
            raise ValueError(
                f"batch norm in a recurrence keeps statistics for {self.num_steps} steps, and step {last} was asked for"
            )
        return averages[first:last]

    # The formulas ----------------------------------------------------------------------------------------------

    @property
    def torch_has_it(self) -> bool:
        """Whether torch's function is this layer's formula; it is the faster one."""
        return not self.norm.mean_only

    def torchs(self, x: Tensor, step: int | None, *, training: bool) -> Tensor:
        gain, shift = (None if p is None else precise(p) for p in (self.weight, self.bias))
        mean, var = self.running_mean, self.running_var
        rows = x if self.layout == "image" else x.reshape(-1, self.num_features)
        if self.num_steps is not None:
            mean, var = self.running(mean, x, step).flatten(), self.running(var, x, step).flatten()
            rows = x.flatten(1)  # each feature of each step is a feature of its own
            gain, shift = (p if p is None or step is not None else p.repeat(x.shape[1]) for p in (gain, shift))
        if not training and torch.is_grad_enabled():  # kept for the backward pass, before which they may move on
            mean, var = mean.clone(), var.clone()
        y = F.batch_norm(rows, mean, var, gain, shift, training, self.norm.momentum, self.eps)
        return y.view_as(x)

    def formula(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        mask: Tensor | None,
        r: Tensor | None = None,
        d: Tensor | None = None,
    ) -> Tensor:
        """The output, from the statistics and, for batch renorm, their correction by a factor r and a shift d."""
        if self.norm.mean_only:
            return self.scale_and_shift(x - mean)
        y = (x - mean) * torch.rsqrt(var + self.eps)
        return self.scale_and_shift(y if r is None or d is None else y * r + d)

    def correction(self, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
        """What leads from the batch's statistics to the running ones, within bounds; no gradient flows through it."""
        norm = self.norm
        since = (self.num_batches_tracked - norm.renorm_start).to(running_var.dtype)
        grown = (since / max(1, norm.renorm_end - norm.renorm_start)).clamp(0, 1)
        r_max, d_max = 1 + (norm.r_max - 1) * grown, norm.d_max * grown
        std = torch.sqrt(running_var + self.eps)
        r = torch.sqrt(var.detach() + self.eps) / std
        d = (mean.detach() - running_mean) / std
        return torch.minimum(torch.maximum(r, 1 / r_max), r_max), torch.minimum(torch.maximum(d, -d_max), d_max)

    def extra_repr(self) -> str:
        steps = "" if self.num_steps is None else f", num_steps={self.num_steps}"
        return f"{super().extra_repr()}, momentum={self.norm.momentum}{steps}"


@torch.no_grad()
def average(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    *,
    momentum: float,
    pooled: Tensor | None,
) -> None:
    """Move running averages towards the statistics of a batch, where these are of two values or more.

    With `pooled`, the number of values in the averages so far, they become the mean and the unbiased variance of all
    those values together.
    """
    mean, var, count = (moment.detach().view_as(running_mean) for moment in (mean, var, count))
    # data: as when torch's own function moves them, what an earlier forward pass has kept stays valid for its backward
    running_mean, running_var = running_mean.data, running_var.data
    away = mean - running_mean
    if pooled is None:
        share = (count > 1).to(mean.dtype) * momentum
        unbiased = var * count / (count - 1).clamp(min=1)
        running_mean.add_(share * away)
        running_var.add_(share * (unbiased - running_var))
        return
    together = (pooled + count).clamp(min=1)
    known = together > 1
    squares = running_var * (pooled - 1).clamp(min=0) + var * count + away.square() * pooled * count / together
    running_mean.add_(away * count / together)
    running_var.copy_(torch.where(known, squares / (together - 1).clamp(min=1), running_var))
    pooled.add_(count)


# Statistics of several processes ------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Gather(torch.autograd.Function):
    """What every process has, stacked; back flows to each the sum of all processes' gradients for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def over_processes(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of all processes' values together, from those of each; every process may have another number of them.

    References:
        Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances
    """
    own = [torch.where(count > 0, moment, 0.0) for moment in (mean, var)]  # of no values they are NaN
    means, variances, counts = Gather.apply(torch.stack([*own, count])).unbind(1)
    total = counts.sum(0)
    shares = counts / total.clamp(min=1)
    joined = (shares * means).sum(0)
    return joined, (shares * (variances + (means - joined).square())).sum(0), total
