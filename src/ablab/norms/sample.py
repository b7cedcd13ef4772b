"""Norms with per-sample statistics: group, layer, instance and RMS norm.

Layer norm is group norm with one group, instance norm is group norm with one group per feature. All of them behave the
same in training and evaluation and do not depend on the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.norms.layer import Layout, NormLayer, Statistic, mean_square, moments
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization, at_least_float32

Scope = Literal["sample", "position"]


class SampleNorm(Norm):
    """Base class of norms whose statistics are taken over groups of features of one sample.

    Args:
        image_scope: "sample" for statistics over all pixels, or "position" for separate statistics at each pixel.
        sequence_scope: "sample" for statistics over all valid steps, or "position" for separate ones at each step.
        affine, eps, weight: see `Norm`.
    """

    statistic_name: ClassVar[str] = "mean and variance"
    features: ClassVar[Literal["each", "group", "all"]]
    layer_class: ClassVar[type[SampleNormLayer]]

    def __init__(
        self,
        *,
        image_scope: Scope = "sample",
        sequence_scope: Scope = "sample",
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)
        for layout, scope in (("image", image_scope), ("sequence", sequence_scope)):
            if scope not in get_args(Scope):
                raise ValueError(f"{layout}_scope={scope}: there are {', '.join(get_args(Scope))}")
        self.image_scope = image_scope
        self.sequence_scope = sequence_scope

    @abstractmethod
    def groups(self, num_features: int) -> int:
        """Return the number of groups that the features are split into."""

    def features_in_group(self, num_features: int) -> int:
        return num_features // self.groups(num_features)

    def scope(self, layout: Layout) -> Scope:
        # the other layouts have no positions to average over
        scopes: dict[Layout, Scope] = {"image": self.image_scope, "sequence": self.sequence_scope}
        return scopes.get(layout, "position")

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        return (Statistic(self.statistic_name, positions=self.scope(layout) == "sample", features=self.features),)

    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> NormLayer:
        return self.layer_class(self, num_features, layout, activation=activation)

    def refusal(self, num_features: int, layout: Layout, *, causal: bool = False) -> str | None:
        return self.divisibility_error(num_features) or super().refusal(num_features, layout, causal=causal)

    def divisibility_error(self, num_features: int) -> str | None:
        """Return an error message if the features cannot be split into groups, else None."""
        return None

    def per_position_override(self, layout: Layout) -> str | None:
        return None if self.features == "each" else f"set norm.{layout}_scope=position"


class SampleNormLayer(NormLayer):
    """Base class of layers with statistics over groups of features of a sample; see `NormLayer` for the shapes."""

    def __init__(
        self, norm: SampleNorm, num_features: int, layout: Layout, *, activation: nn.Module | None = None
    ) -> None:
        super().__init__(norm, num_features, layout, activation=activation)
        self.num_groups = norm.groups(num_features)
        self.scope = norm.scope(layout)

    def split_groups(self, x: Tensor) -> Tensor:
        """Split the feature dimension of `x` into two: groups, and features within a group."""
        return x.unflatten(self.feature_dim, (self.num_groups, -1))

    @property
    def within_group_dim(self) -> int:
        """Dimension of a grouped tensor that holds the features within a group."""
        return 2 if self.layout == "image" else -1

    def dims(self, grouped: Tensor) -> tuple[int, ...]:
        """Return the dimensions of a grouped tensor that one statistic is taken over."""
        if self.scope == "position":
            return (self.within_group_dim,)
        return tuple(range(2, grouped.dim())) if self.layout == "image" else (1, -1)

    def normalize_positions(self, x: Tensor) -> Tensor:
        """Normalize each position separately, in any layout."""
        if self.layout != "image":
            return self.normalize_last_dim(x)
        y = self.normalize_last_dim(x.movedim(1, -1)).movedim(-1, 1)
        return y.contiguous() if x.is_contiguous() else y  # keep the memory format

    def normalize_last_dim(self, x: Tensor) -> Tensor:
        """Normalize `(…, C)` over its last dimension, for the scope "position"."""
        raise NotImplementedError

    def broadcast_mask(self, valid: Tensor | None) -> Tensor | None:
        """Reshape a mask `(N, L)` to broadcast against a grouped sequence `(N, L, groups, features)`."""
        return None if valid is None or self.layout == "image" else valid[..., None, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}, scope={self.scope}"


class GroupNormLayer(SampleNormLayer):
    """y = (x − mean) / sqrt(var + eps) · gamma + beta, over groups of features."""

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        if self.scope == "position":
            return self.normalize_positions(x)
        if valid is not None:
            grouped = self.split_groups(at_least_float32(x))
            mean, var, _ = moments(grouped, self.dims(grouped), self.broadcast_mask(valid))
            return self.scale_and_shift(((grouped - mean) * torch.rsqrt(var + self.eps)).view_as(x))
        if self.layout == "image":
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(x.transpose(1, 2), self.num_groups, self.weight, self.bias, self.eps).transpose(1, 2)

    def normalize_last_dim(self, x: Tensor) -> Tensor:
        if self.num_groups == 1:
            return F.layer_norm(x, (self.num_features,), self.weight, self.bias, self.eps)
        # layer norm within each group: F.group_norm is slow for groups with a single position
        y = F.layer_norm(x.unflatten(-1, (self.num_groups, -1)), (self.group_size,), eps=self.eps).flatten(-2)
        if self.weight is None or self.bias is None:
            return y
        return torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))


class GroupNorm(SampleNorm):
    """Group normalization: zero mean and unit variance over each group of features of a sample.

    y = (x − mean) / sqrt(var + eps) · gamma + beta, with mean and biased variance over the features of a group and, for
    the scope "sample", over all positions of the sample.

    Args:
        num_groups: number of groups; must divide the number of features.
        group_size: number of features per group, instead of `num_groups`.
        image_scope, sequence_scope, affine, eps, weight: see `SampleNorm`.

    Raises:
        ValueError: both or none of `num_groups` and `group_size` are given, or one is below 1.

    References:
        Wu & He 2018, https://arxiv.org/abs/1803.08494
    """

    features = "group"
    layer_class: ClassVar[type[SampleNormLayer]] = GroupNormLayer

    def __init__(
        self,
        *,
        num_groups: int | None = None,
        group_size: int | None = None,
        image_scope: Scope = "sample",
        sequence_scope: Scope = "sample",
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(image_scope=image_scope, sequence_scope=sequence_scope, affine=affine, eps=eps, weight=weight)
        if (num_groups is None) == (group_size is None):
            raise ValueError(
                f"num_groups={num_groups}, group_size={group_size}: give one of them and set the other to null"
            )
        if num_groups is not None and num_groups < 1:
            raise ValueError(f"num_groups={num_groups}: at least one group is needed")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size={group_size}: a group has at least one feature")
        self.num_groups = num_groups
        self.group_size = group_size

    def groups(self, num_features: int) -> int:
        if self.num_groups is not None:
            return self.num_groups
        assert self.group_size is not None
        return num_features // self.group_size

    def divisibility_error(self, num_features: int) -> str | None:
        name, value = ("num_groups", self.num_groups) if self.group_size is None else ("group_size", self.group_size)
        assert value is not None
        if num_features % value == 0:
            return None
        divisors = [n for n in range(1, num_features + 1) if num_features % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - value), -n))
        return (
            f"{name}={value} does not divide {num_features} features; divisors are "
            f"{' '.join(map(str, divisors))}; set norm.{name}={nearest}"
        )


class LayerNorm(SampleNorm):
    """Layer normalization: zero mean and unit variance over all features of a sample, or of each position.

    Args:
        image_scope: "sample" for statistics over (C, H, W), as in the group norm paper; or "position" for statistics
            over C at each pixel, as in ConvNeXt. These are different functions.
        sequence_scope: "position" for statistics over C at each step, as in transformers; or "sample" for statistics
            over all valid steps.
        affine, eps, weight: see `Norm`.

    References:
        Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450
    """

    features = "all"
    layer_class = GroupNormLayer

    def __init__(
        self,
        *,
        image_scope: Scope = "sample",
        sequence_scope: Scope = "position",
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(image_scope=image_scope, sequence_scope=sequence_scope, affine=affine, eps=eps, weight=weight)

    def groups(self, num_features: int) -> int:
        return 1


class InstanceNorm(SampleNorm):
    """Instance normalization: zero mean and unit variance over the positions of each feature of each sample.

    Args:
        affine, eps, weight: see `Norm`.

    References:
        Ulyanov, Vedaldi & Lempitsky 2016, https://arxiv.org/abs/1607.08022
    """

    features = "each"
    layer_class: ClassVar[type[SampleNormLayer]] = GroupNormLayer

    def __init__(
        self, *, affine: bool = True, eps: float = 1e-5, weight: WeightReparametrization | None = None
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)

    def groups(self, num_features: int) -> int:
        return num_features


class RMSNormLayer(SampleNormLayer):
    """y = x / sqrt(mean(x²) + eps) · gamma."""

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        if self.scope == "position":
            return self.normalize_positions(x)
        x = at_least_float32(x)
        grouped = self.split_groups(x)
        square = mean_square(grouped, self.dims(grouped), self.broadcast_mask(valid))
        return self.scale_and_shift((grouped * torch.rsqrt(square + self.eps)).view_as(x))

    def normalize_last_dim(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.weight.to(x.dtype)  # the fused kernel requires equal dtypes
        return F.rms_norm(x, (self.num_features,), gain, self.eps)


class RMSNorm(SampleNorm):
    """Root mean square normalization: unit mean square over all features of each position, or of a sample.

    y = x / sqrt(mean(x²) + eps) · gamma. It neither subtracts a mean nor learns a shift, so the modules before it keep
    their bias.

    Args:
        image_scope: "sample" for statistics over (C, H, W), or "position" for statistics over C at each pixel.
        sequence_scope: "position" for statistics over C at each step, or "sample" for statistics over all valid steps.
        affine: learn a gain per feature.
        eps, weight: see `Norm`; eps is inside the root.

    References:
        Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    statistic_name = "mean square"
    features = "all"
    layer_class = RMSNormLayer

    def __init__(
        self,
        *,
        image_scope: Scope = "sample",
        sequence_scope: Scope = "position",
        affine: bool = True,
        eps: float = 1e-5,
        weight: WeightReparametrization | None = None,
    ) -> None:
        super().__init__(image_scope=image_scope, sequence_scope=sequence_scope, affine=affine, eps=eps, weight=weight)

    @property
    def has_shift(self) -> bool:
        return False

    def groups(self, num_features: int) -> int:
        return 1
