"""Batch norm: normalizes by batch statistics in training and by their running averages in evaluation.

Synchronized, ghost, mean-only and frozen batch norm and batch renorm are settings of one class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.norms.layer import WITHOUT_POSITIONS, Layout, NormLayer, Statistic, moments
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization, at_least_float32


class BatchNorm(Norm):
    """Batch normalization: zero mean and unit variance of each feature over the batch and all positions.

    y = (x − mean) / sqrt(var + eps) · gamma + beta. Training normalizes by the batch's own mean and biased variance and
    averages them (the variance unbiased) for evaluation: running ← (1 − momentum) · running + momentum · batch.
    Inside a recurrence, each time step has its own statistics, and gamma starts at `recurrent_gain`.

    With a mask, a statistic over fewer than two valid values is replaced by its running average.

    Args:
        momentum: the weight of the newest batch in the running averages.
        recurrent_gain: initial gamma inside a recurrence; 1 would saturate the gates (Cooijmans et al.).
        sync: compute the statistics over the batches of all processes (synchronized batch norm).
        ghost_batch_size: compute the statistics over groups of this many samples (ghost batch norm); None uses the
            whole batch.
        mean_only: only subtract the mean, and learn a shift but no gain (Salimans & Kingma).
        r_max, d_max: bounds of batch renorm, which corrects the batch statistics towards the running ones by a factor
            of at most `r_max` and a shift of at most `d_max`; 1 and 0 are plain batch norm.
        renorm_start, renorm_end: training steps between which the bounds grow linearly from 1 and 0 to their values.
        frozen: normalize by the stored averages in training too, and train neither gain nor shift.
        affine, eps, weight: see `Norm`.

    Raises:
        ValueError: settings are out of range or exclude each other.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
        Inside a recurrence: Cooijmans et al. 2016, https://arxiv.org/abs/1603.09025
        Mean-only: Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868
        Renorm: Ioffe 2017, https://arxiv.org/abs/1702.03275, which averages the standard deviation; here the variance
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
        """Describe the set of samples that a statistic is taken over."""
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

    def normalization_batch_size(self, micro_batch: int, world_size: int) -> int:
        if self.frozen:
            return 1
        return min(self.ghost_batch_size or micro_batch, micro_batch) * (world_size if self.sync else 1)


class BatchNormLayer(NormLayer):
    """Batch norm of one layout; see `BatchNorm` for the formula and `NormLayer` for the shapes.

    The running averages stay in float32 (or float64) whatever dtype the module is cast to: bfloat16 would round their
    small updates away. In a recurrence they have the shape `(num_steps, C)`; all steps share gain and shift.

    Raises:
        ValueError: in training, a statistic would be taken over a single value; or a step is beyond `num_steps`.
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
        self.pooled: Tensor | None = None  # number of values pooled so far, during `recalibrate`
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
    def uses_batch_statistics(self) -> bool:
        """Return whether the layer normalizes by batch statistics and updates the running averages."""
        return self.training and not self.norm.frozen

    def samples_per_statistic(self, batch: int, num_processes: int | None) -> int:
        ghost = self.norm.ghost_batch_size
        if ghost is not None and batch > ghost:
            return batch % ghost or ghost  # the last ghost batch is the smallest
        return batch * (num_processes or world_size()) if self.norm.sync else batch

    # Normalization, one ghost batch at a time ------------------------------------------------------------------

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        if not self.uses_batch_statistics:
            return self.normalize_by_running(x, valid, step)
        if not step and self.pooled is None:  # once per sequence
            self.num_batches_tracked.add_(1)
        ghost = self.norm.ghost_batch_size
        if ghost is None or len(x) <= ghost:
            return self.normalize_by_batch(x, valid, step)
        parts = x.split(ghost)
        masks = [None] * len(parts) if valid is None else valid.split(ghost)
        return torch.cat([self.normalize_by_batch(part, mask, step) for part, mask in zip(parts, masks, strict=True)])

    def normalize_by_running(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        """Normalize by the running averages, without updating them."""
        if self.has_torch_kernel:
            return self.torch_batch_norm(x, step, training=False)
        mean, var = self.running_for(self.running_mean, x, step), self.running_for(self.running_var, x, step)
        return self.apply_statistics(at_least_float32(x), mean, var, self.broadcast_mask(valid))

    def normalize_by_batch(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        """Normalize by the batch statistics and update the running averages."""
        synchronized = self.norm.sync and world_size() > 1
        if (
            self.has_torch_kernel
            and valid is None
            and self.pooled is None
            and not synchronized
            and not self.norm.renorm
        ):
            return self.torch_batch_norm(x, step, training=True)
        x, mask = at_least_float32(x), self.broadcast_mask(valid)
        mean, var, count = batch_moments = moments(x, self.dims(x), mask)
        if synchronized:
            mean, var, count = batch_moments = combine_moments(*batch_moments)
        running_mean, running_var = (
            self.running_for(self.running_mean, x, step),
            self.running_for(self.running_var, x, step),
        )
        if mask is not None:  # the statistics of fewer than two values are degenerate
            mean = torch.where(count > 1, mean, running_mean)
            var = torch.where(count > 1, var, running_var)
        r, d, pooled = None, None, None
        if self.pooled is not None:
            pooled = self.running_for(self.pooled, x, step)
        elif self.norm.renorm:
            r, d = self.renorm_correction(mean, var, running_mean, running_var)
        update_running(running_mean, running_var, *batch_moments, momentum=self.norm.momentum, pooled=pooled)
        return self.apply_statistics(x, mean, var, mask, r, d)

    def broadcast_mask(self, valid: Tensor | None) -> Tensor | None:
        """Reshape `valid` to broadcast against an input."""
        return None if valid is None else valid.unsqueeze(-1)

    def dims(self, x: Tensor) -> tuple[int, ...]:
        """Return the dimensions that one statistic is taken over."""
        if self.layout == "image":
            return (0, *range(2, x.dim()))
        return (0,) if self.layout in WITHOUT_POSITIONS else (0, 1)

    def running_for(self, averages: Tensor, x: Tensor, step: int | None) -> Tensor:
        """Return the running averages for `x` as a writable view that broadcasts against `x`."""
        if self.num_steps is None:
            return self.broadcast(averages, x)
        first, last = (0, x.shape[1]) if step is None else (step, step + 1)
        if last > self.num_steps:
            raise ValueError(
                f"batch norm in a recurrence keeps statistics for {self.num_steps} steps, and step {last} was asked for"
            )
        return averages[first:last]

    # The formulas ----------------------------------------------------------------------------------------------

    @property
    def has_torch_kernel(self) -> bool:
        """Return whether `F.batch_norm`, which is faster, computes this layer's formula."""
        return not self.norm.mean_only

    def torch_batch_norm(self, x: Tensor, step: int | None, *, training: bool) -> Tensor:
        """Normalize with `F.batch_norm`."""
        gain, shift = (None if p is None else at_least_float32(p) for p in (self.weight, self.bias))
        mean, var = self.running_mean, self.running_var
        rows = x if self.layout == "image" else x.reshape(-1, self.num_features)
        if self.num_steps is not None:
            mean, var = self.running_for(mean, x, step).flatten(), self.running_for(var, x, step).flatten()
            rows = x.flatten(1)  # each feature of each step counts as a feature
            gain, shift = (p if p is None or step is not None else p.repeat(x.shape[1]) for p in (gain, shift))
        # saved for the backward pass, before which an update could change them
        if not training and torch.is_grad_enabled():
            mean, var = mean.clone(), var.clone()
        y = F.batch_norm(rows, mean, var, gain, shift, training, self.norm.momentum, self.eps)
        return y.view_as(x)

    def apply_statistics(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        mask: Tensor | None,
        r: Tensor | None = None,
        d: Tensor | None = None,
    ) -> Tensor:
        """Return the output for given statistics and, in batch renorm, the corrections r (factor) and d (shift)."""
        if self.norm.mean_only:
            return self.scale_and_shift(x - mean)
        y = (x - mean) * torch.rsqrt(var + self.eps)
        return self.scale_and_shift(y if r is None or d is None else y * r + d)

    def renorm_correction(
        self, mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return batch renorm's clipped corrections r and d, detached from the graph (Ioffe 2017, algorithm 1)."""
        norm = self.norm
        steps = (self.num_batches_tracked - norm.renorm_start).to(running_var.dtype)
        progress = (steps / max(1, norm.renorm_end - norm.renorm_start)).clamp(0, 1)
        r_max, d_max = 1 + (norm.r_max - 1) * progress, norm.d_max * progress
        std = torch.sqrt(running_var + self.eps)
        r = torch.sqrt(var.detach() + self.eps) / std
        d = (mean.detach() - running_mean) / std
        return torch.minimum(torch.maximum(r, 1 / r_max), r_max), torch.minimum(torch.maximum(d, -d_max), d_max)

    def extra_repr(self) -> str:
        steps = "" if self.num_steps is None else f", num_steps={self.num_steps}"
        return f"{super().extra_repr()}, momentum={self.norm.momentum}{steps}"


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    *,
    momentum: float,
    pooled: Tensor | None,
) -> None:
    """Update running averages with the statistics of a batch, where these cover at least two values.

    With `pooled`, the number of values so far, compute the exact mean and unbiased variance of all values instead of
    an exponential average (Chan, Golub & LeVeque 1979).
    """
    mean, var, count = (moment.detach().view_as(running_mean) for moment in (mean, var, count))
    # .data does not bump the version counter, so that an earlier forward pass can still run its backward pass
    running_mean, running_var = running_mean.data, running_var.data
    delta = mean - running_mean
    if pooled is None:
        weight = (count > 1).to(mean.dtype) * momentum
        unbiased = var * count / (count - 1).clamp(min=1)
        running_mean.add_(weight * delta)
        running_var.add_(weight * (unbiased - running_var))
        return
    total = (pooled + count).clamp(min=1)
    squares = running_var * (pooled - 1).clamp(min=0) + var * count + delta.square() * pooled * count / total
    running_mean.add_(delta * count / total)
    running_var.copy_(torch.where(total > 1, squares / (total - 1).clamp(min=1), running_var))
    pooled.add_(count)


# Statistics over several processes -----------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class AllGather(torch.autograd.Function):
    """Gather and stack the tensors of all processes; the backward pass sums the gradients over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def combine_moments(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the moments of all processes, whose numbers of values may differ.

    References:
        Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances
    """
    own = [torch.where(count > 0, moment, 0.0) for moment in (mean, var)]  # NaN where a process has no values
    means, variances, counts = AllGather.apply(torch.stack([*own, count])).unbind(1)
    total = counts.sum(0)
    weights = counts / total.clamp(min=1)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0), total
