"""Norms whose statistics stay inside one sample: layer, group and instance norm.

They are one function, group norm, at different numbers of groups: 1 is layer norm, one group for each feature is
instance norm. Train and eval are the same, and the batch does not matter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.norms.norm import Layout, Norm, NormLayer, Scope, Site, masked_moments
from ablab.norms.weight import WeightReparametrization


class GroupNorm(Norm):
    """Group normalization: zero mean and unit variance over each group of features of a sample.

    y = (x − mean) / sqrt(var + eps) · gamma + beta, mean and biased variance over the features of a group and, for the
    scope "sample", over all of the sample's positions.

    Args:
        num_groups: the features are split into this many groups; it must divide their number.
        image_scope: "sample", over the group and all pixels (Wu & He), or "position", over the group at each pixel.
        sequence_scope: "sample", over the group and all valid steps, or "position", at each step on its own.
        affine, eps, weight: see `Norm`.

    References:
        Wu & He 2018, https://arxiv.org/abs/1803.08494
    """

    def __init__(
        self,
        *,
        num_groups: int = 8,
        image_scope: Scope = "sample",
        sequence_scope: Scope = "sample",
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups}: at least one group is needed")
        self.num_groups = num_groups
        self.scopes: dict[Layout, Scope] = {"image": image_scope, "sequence": sequence_scope}

    def groups(self, num_features: int) -> int:
        return self.num_groups

    def layer(self, num_features: int, layout: Layout) -> NormLayer:
        return SampleNormLayer(
            num_features,
            num_groups=self.groups(num_features),
            layout=layout,
            scope=self.scopes[layout],
            affine=self.affine,
            eps=self.eps,
        )

    def recurrent_layer(self, num_features: int, site: Site, num_steps: int) -> NormLayer:
        return SampleNormLayer(
            num_features,
            num_groups=self.groups(num_features),
            layout="sequence",
            scope="position",
            affine=self.affine,
            eps=self.eps,
        )

    def refusal(self, num_features: int, layout: Layout, *, causal: bool) -> str | None:
        if causal and self.scopes[layout] == "sample":
            return (
                "statistics over all steps of a sequence would leak the future into a causal model; "
                "set norm.sequence_scope=position, or choose norm=layernorm, weightnorm or none"
            )
        return self.indivisible(num_features) or self.one_value(num_features, self.scopes[layout])

    def recurrent_refusal(self, num_features: int) -> str | None:
        return self.indivisible(num_features) or self.one_value(num_features, "position")

    def indivisible(self, num_features: int) -> str | None:
        groups = self.groups(num_features)
        if num_features % groups == 0:
            return None
        divisors = [n for n in range(1, num_features + 1) if num_features % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - groups), -n))
        return (
            f"num_groups={groups} does not divide {num_features} features; divisors are "
            f"{' '.join(map(str, divisors))}; set norm.num_groups={nearest}"
        )

    def one_value(self, num_features: int, scope: Scope) -> str | None:
        if scope == "sample" or num_features > self.groups(num_features):
            return None
        return (
            "each statistic would be taken over one value, and the output would be a constant; "
            "choose fewer groups, or another norm (layernorm, batchnorm, weightnorm, none)"
        )


class LayerNorm(GroupNorm):
    """Layer normalization: zero mean and unit variance over all features of a sample, or of each position.

    Args:
        image_scope: "sample", over (C, H, W), which is the layer norm of the group-norm paper; or "position", over C
            at each pixel, as in ConvNeXt. They are different functions.
        sequence_scope: "position", each step on its own, as in transformers; or "sample", over all valid steps.
        affine, eps, weight: see `Norm`.

    References:
        Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450
    """

    def __init__(
        self,
        *,
        image_scope: Scope = "sample",
        sequence_scope: Scope = "position",
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(
            num_groups=1,
            image_scope=image_scope,
            sequence_scope=sequence_scope,
            affine=affine,
            eps=eps,
            weight=weight,
        )


class InstanceNorm(GroupNorm):
    """Instance normalization: zero mean and unit variance over the positions of each feature of each sample.

    Args:
        affine, eps, weight: see `Norm`.

    References:
        Ulyanov, Vedaldi & Lempitsky 2016, https://arxiv.org/abs/1607.08022
    """

    def __init__(
        self, *, affine: bool = True, eps: float = 1e-5, weight: WeightReparametrization | None = None
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)

    def groups(self, num_features: int) -> int:
        return num_features

    def refusal(self, num_features: int, layout: Layout, *, causal: bool) -> str | None:
        if causal:
            return (
                "statistics over all steps of a sequence would leak the future into a causal model, and a single "
                "step has one value for each feature; choose norm=layernorm, groupnorm, weightnorm or none"
            )
        return None

    def recurrent_refusal(self, num_features: int) -> str | None:
        return (
            "instance norm is not defined inside a recurrence: a single time step has one value for each feature, "
            "and the output would be a constant; choose norm=layernorm, groupnorm, batchnorm, weightnorm or none"
        )


class SampleNormLayer(NormLayer):
    """Group norm of one layout and scope; see `GroupNorm` for the formula and `NormLayer` for the shapes.

    Raises:
        ValueError: a statistic would be taken over a single value, or the features lie elsewhere.
    """

    def __init__(
        self, num_features: int, *, num_groups: int, layout: Layout, scope: Scope, affine: bool, eps: float
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine)
        self.num_groups = num_groups
        self.layout = layout
        self.scope = scope

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        feature_dim = 1 if self.layout == "image" else -1
        self.check_features(x, feature_dim)
        if self.scope == "position":
            return self.each_position(x.movedim(feature_dim, -1)).movedim(-1, feature_dim)
        if valid is not None:
            return self.valid_positions(x, valid)
        x = x.movedim(feature_dim, 1)
        values = x[0].numel() // self.num_groups
        if values == 1:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} in {self.num_groups} groups has one value for each statistic, "
                "and the output would be a constant; use larger inputs, fewer groups or another norm"
            )
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps).movedim(1, feature_dim)

    def each_position(self, x: Tensor) -> Tensor:
        if self.num_groups == 1:
            return F.layer_norm(x, (self.num_features,), self.weight, self.bias, self.eps)
        rows = x.reshape(-1, self.num_features)
        return F.group_norm(rows, self.num_groups, self.weight, self.bias, self.eps).view(x.shape)

    def valid_positions(self, x: Tensor, valid: Tensor) -> Tensor:
        """Statistics of `(N, L, C)` over the steps that `valid` `(N, L)` marks as real."""
        grouped = x.float().unflatten(-1, (self.num_groups, -1))  # (N, L, G, C / G)
        mean, var, _ = masked_moments(grouped, valid[:, :, None, None], (1, 3))
        y = ((grouped - mean) * torch.rsqrt(var + self.eps)).flatten(2)
        return self.scale_and_shift(y).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}, layout={self.layout}, scope={self.scope}"
