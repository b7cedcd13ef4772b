"""Batch norm: statistics over the batch while training, over their running averages afterwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.norms.norm import Layout, Norm, NormLayer, Site, masked_moments
from ablab.norms.weight import WeightReparametrization


class BatchNorm(Norm):
    """Batch normalization: zero mean and unit variance of each feature over the batch and all positions.

    y = (x − mean) / sqrt(var + eps) · gamma + beta. Training normalizes by the batch's own mean and biased variance and
    averages them (the variance unbiased) for evaluation: running ← (1 − momentum) · running + momentum · batch.
    Inside a recurrence the statistics are kept for each time step, and gamma starts at `recurrent_gain`.

    Args:
        momentum: the share of the newest batch in the running averages.
        recurrent_gain: where gamma starts inside a recurrence; 1 would saturate the gates (Cooijmans et al.).
        affine, eps, weight: see `Norm`.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
        Cooijmans et al. 2016, https://arxiv.org/abs/1603.09025
    """

    def __init__(
        self,
        *,
        momentum: float = 0.1,
        recurrent_gain: float = 0.1,
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum={momentum}: a share of the newest batch is needed, more than 0 and at most 1")
        self.momentum = momentum
        self.recurrent_gain = recurrent_gain

    def layer(self, num_features: int, layout: Layout) -> NormLayer:
        return BatchNormLayer(num_features, layout=layout, momentum=self.momentum, affine=self.affine, eps=self.eps)

    def recurrent_layer(self, num_features: int, site: Site, num_steps: int) -> NormLayer:
        return RecurrentBatchNormLayer(
            num_features,
            num_steps=num_steps,
            momentum=self.momentum,
            gain=self.recurrent_gain,
            affine=self.affine,
            eps=self.eps,
        )

    def refusal(self, num_features: int, layout: Layout, *, causal: bool) -> str | None:
        if causal:
            return (
                "batch statistics over all steps of a sequence would leak the future into a causal model; "
                "choose norm=layernorm, weightnorm or none, or norm=groupnorm norm.sequence_scope=position"
            )
        return None


def check_count(values: int, shape: torch.Size) -> None:
    """Refuse a batch in which every feature has a single value."""
    if values == 1:
        raise ValueError(
            f"batch norm in training needs more than one value for each feature, and an input of shape {tuple(shape)} "
            "has one; raise data.batch_size, or choose a norm that does not look at the batch (layernorm, groupnorm)"
        )


class BatchNormLayer(NormLayer):
    """Batch norm of images or sequences; see `BatchNorm` for the formula and `NormLayer` for the shapes.

    Raises:
        ValueError: in training, when each feature has a single value, or the features lie elsewhere.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, *, layout: Layout, momentum: float, affine: bool, eps: float) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.layout = layout
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        feature_dim = 1 if self.layout == "image" else -1
        self.check_features(x, feature_dim)
        if valid is not None and self.training:
            return self.valid_positions(x, valid)
        if self.training:
            check_count(x.numel() // self.num_features, x.shape)
        rows = x if self.layout == "image" else x.reshape(-1, self.num_features)
        return F.batch_norm(
            rows,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        ).view_as(x)

    def valid_positions(self, x: Tensor, valid: Tensor) -> Tensor:
        """Statistics of `(N, L, C)` over the steps that `valid` `(N, L)` marks as real."""
        mean, var, count = masked_moments(x.float(), valid[:, :, None], (0, 1))
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(unbiased.flatten(), self.momentum)
        y = (x - mean) * torch.rsqrt(var + self.eps)
        return self.scale_and_shift(y).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, layout={self.layout}"


class RecurrentBatchNormLayer(NormLayer):
    """Batch norm with statistics of its own for each time step; gain and shift are shared by all steps.

    Shape:
        - `(N, C)` with a `step`, and `valid` `(N)`; or `(N, T, C)` for steps 0 … T − 1, and `valid` `(N, T)`.

    Raises:
        ValueError: a batch of one in training, a step beyond `num_steps`, or the features lie elsewhere.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, *, num_steps: int, momentum: float, gain: float, affine: bool, eps: float
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, gain=gain)
        self.num_steps = num_steps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_steps, num_features))
        self.register_buffer("running_var", torch.ones(num_steps, num_features))

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        self.check_features(x, -1)
        first, last = (0, x.shape[1]) if step is None else (step, step + 1)
        if last > self.num_steps:
            raise ValueError(
                f"batch norm in a recurrence keeps statistics for {self.num_steps} steps, and step {last} was asked for"
            )
        running_mean = self.running_mean[first:last]
        running_var = self.running_var[first:last]
        if self.training:
            check_count(x.shape[0], x.shape)
            mean, var = self.batch_moments(x.float(), valid, running_mean, running_var)
        else:
            mean, var = running_mean, running_var
        y = (x - mean) * torch.rsqrt(var + self.eps)
        return self.scale_and_shift(y).to(x.dtype)

    def batch_moments(
        self, x: Tensor, valid: Tensor | None, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The batch's mean and biased variance at each step, after averaging them into the running ones."""
        if valid is None:
            var, mean = torch.var_mean(x, 0, correction=0)
            count = torch.tensor(x.shape[0], device=x.device)
        else:
            mean, var, count = (moment[0] for moment in masked_moments(x, valid[..., None], (0,)))
        with torch.no_grad():
            # a step that fewer than two sequences reach has no variance to average
            share = torch.where(count > 1, self.momentum, 0.0)
            unbiased = var * count / (count - 1).clamp(min=1)
            running_mean.add_(share * (mean - running_mean))
            running_var.add_(share * (unbiased - running_var))
        return mean, var

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, num_steps={self.num_steps}"
