"""EvoNorm: combined norm and nonlinearity layers found by evolutionary search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablab.norms.batch import BatchNorm, BatchNormLayer
from ablab.norms.layer import WITHOUT_POSITIONS, Layout, NormLayer, Statistic, moments
from ablab.norms.sample import GroupNorm, SampleNorm, SampleNormLayer
from ablab.norms.weight import WeightReparametrization, at_least_float32


class EvoNormS0Layer(SampleNormLayer):
    """x · sigmoid(v · x) / sqrt(var + eps) · gamma + beta; see `EvoNormS0`."""

    def __init__(
        self, norm: SampleNorm, num_features: int, layout: Layout, *, activation: nn.Module | None = None
    ) -> None:
        super().__init__(norm, num_features, layout)
        self.v = None if activation is None else nn.Parameter(torch.ones(num_features))

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        x = at_least_float32(x)
        grouped = self.split_groups(x)
        _, var, _ = moments(grouped, self.dims(grouped), self.broadcast_mask(valid))
        scale = torch.rsqrt(var + self.eps).expand_as(grouped).reshape(x.shape)
        if self.v is not None:
            scale = scale * torch.sigmoid(x * self.broadcast(self.v, x))
        return self.scale_and_shift(x * scale)


class EvoNormS0(GroupNorm):
    """EvoNorm-S0: a norm over groups of features of a sample that brings its own nonlinearity.

    y = x · sigmoid(v · x) / sqrt(var + eps) · gamma + beta, with a learned v per feature and the biased variance over a
    group and all positions. Where the model puts no nonlinearity after the norm, only the division remains.

    Args:
        num_groups, group_size, image_scope, sequence_scope, affine, eps, weight: see `GroupNorm`.

    References:
        Liu et al. 2020, https://arxiv.org/abs/2004.02967
    """

    statistic_name = "variance"
    layer_class = EvoNormS0Layer


class EvoNormB0(BatchNorm):
    """EvoNorm-B0: a norm over the batch that brings its own nonlinearity.

    y = x / max(sqrt(batch var + eps), v · x + sqrt(instance var + eps)) · gamma + beta, with a learned v per
    feature; evaluation uses the running average of the batch variance. Where the model puts no nonlinearity after the
    norm, only the division by sqrt(batch var + eps) remains.

    Args:
        momentum, sync: see `BatchNorm`.
        affine, eps, weight: see `Norm`.

    References:
        Liu et al. 2020, https://arxiv.org/abs/2004.02967
    """

    def __init__(
        self,
        *,
        momentum: float = 0.1,
        sync: bool = False,
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(momentum=momentum, sync=sync, affine=affine, eps=eps, weight=weight)

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        batch_var = Statistic("variance", batch=self.batch, positions=layout not in WITHOUT_POSITIONS, source="running")
        if layout == "recurrence":  # no nonlinearity follows a norm in a recurrence
            return (batch_var,)
        return (batch_var, Statistic("variance", positions=layout not in WITHOUT_POSITIONS))

    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> NormLayer:
        return EvoNormB0Layer(self, num_features, layout, num_steps=num_steps, activation=activation)


class EvoNormB0Layer(BatchNormLayer):
    """x / max(sqrt(batch var + eps), v · x + sqrt(instance var + eps)); see `EvoNormB0`."""

    def __init__(
        self,
        norm: BatchNorm,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__(norm, num_features, layout, num_steps=num_steps)
        self.v = None if activation is None else nn.Parameter(torch.ones(num_features))
        if self.v is None:  # only the batch variance is used
            self.statistics = self.statistics[:1]

    @property
    def has_torch_kernel(self) -> bool:
        return False

    def apply_statistics(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        mask: Tensor | None,
        r: Tensor | None = None,
        d: Tensor | None = None,
    ) -> Tensor:
        std = torch.sqrt(var + self.eps)
        if self.v is not None:
            _, instance_var, _ = moments(x, self.dims(x)[1:], mask)
            std = torch.maximum(std, x * self.broadcast(self.v, x) + torch.sqrt(instance_var + self.eps))
        return self.scale_and_shift(x / std)
