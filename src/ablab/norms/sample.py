"""Norms whose statistics stay inside one sample: group, layer, instance and RMS norm.

They are one function at different numbers of groups: 1 is layer norm, one group for each feature is instance norm.
Train and eval are the same, and the batch does not matter.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.norms.layer import Layout, NormLayer, Statistic, mean_square, moments
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization, precise

Scope = Literal["sample", "position"]


class SampleNorm(Norm):
    """What norms have in common that measure groups of features of a sample.

    Args:
        image_scope: "sample", over all pixels, or "position", at each pixel on its own.
        sequence_scope: "sample", over all valid steps, or "position", at each step on its own.
        affine, eps, weight: see `Norm`.
    """

    measures: ClassVar[str] = "mean and variance"
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
        """How many groups the features are split into."""

    def features_in_group(self, num_features: int) -> int:
        return num_features // self.groups(num_features)

    def scope(self, layout: Layout) -> Scope:
        # a vector, one head of one step, and one step of a recurrence, stand alone
        scopes: dict[Layout, Scope] = {"image": self.image_scope, "sequence": self.sequence_scope}
        return scopes.get(layout, "position")

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        return (Statistic(self.measures, positions=self.scope(layout) == "sample", features=self.features),)

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
        return self.indivisible(num_features) or super().refusal(num_features, layout, causal=causal)

    def indivisible(self, num_features: int) -> str | None:
        """Why the features cannot be split into groups."""
        return None

    def within_position(self, layout: Layout) -> str | None:
        return None if self.features == "each" else f"set norm.{layout}_scope=position"


class SampleNormLayer(NormLayer):
    """Statistics of groups of features of a sample, at each position or over all; see `NormLayer` for the shapes."""

    def __init__(
        self, norm: SampleNorm, num_features: int, layout: Layout, *, activation: nn.Module | None = None
    ) -> None:
        super().__init__(norm, num_features, layout, activation=activation)
        self.num_groups = norm.groups(num_features)
        self.scope = norm.scope(layout)

    def grouped(self, x: Tensor) -> Tensor:
        """`x` with its features as two dimensions, groups and the features of each."""
        return x.unflatten(self.feature_dim, (self.num_groups, -1))

    @property
    def own_dim(self) -> int:
        """The dimension of a grouped tensor that holds the features of each group."""
        return 2 if self.layout == "image" else -1

    def dims(self, grouped: Tensor) -> tuple[int, ...]:
        """The dimensions of a grouped tensor that one statistic is taken over."""
        if self.scope == "position":
            return (self.own_dim,)
        return tuple(range(2, grouped.dim())) if self.layout == "image" else (1, -1)

    def at_each_position(self, x: Tensor) -> Tensor:
        """Each position on its own, wherever the layout has the features."""
        if self.layout != "image":
            return self.each_position(x)
        y = self.each_position(x.movedim(1, -1)).movedim(-1, 1)
        return y.contiguous() if x.is_contiguous() else y  # the memory format stays

    def each_position(self, x: Tensor) -> Tensor:
        """Normalize `(…, C)` over its last dimension, for norms that have the scope "position"."""
        raise NotImplementedError

    def beside_groups(self, valid: Tensor | None) -> Tensor | None:
        """A mask `(N, L)` in the shape that broadcasts it against a grouped sequence `(N, L, groups, features)`."""
        return None if valid is None or self.layout == "image" else valid[..., None, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}, scope={self.scope}"


class GroupNormLayer(SampleNormLayer):
    """y = (x − mean) / sqrt(var + eps) · gamma + beta, over groups of features."""

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        if self.scope == "position":
            return self.at_each_position(x)
        if valid is not None:
            grouped = self.grouped(precise(x))
            mean, var, _ = moments(grouped, self.dims(grouped), self.beside_groups(valid))
            return self.scale_and_shift(((grouped - mean) * torch.rsqrt(var + self.eps)).view_as(x))
        if self.layout == "image":
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return F.group_norm(x.transpose(1, 2), self.num_groups, self.weight, self.bias, self.eps).transpose(1, 2)

    def each_position(self, x: Tensor) -> Tensor:
        if self.num_groups == 1:
            return F.layer_norm(x, (self.num_features,), self.weight, self.bias, self.eps)
        # layer norm of each group: torch's group norm is slow where a group has one position
        y = F.layer_norm(x.unflatten(-1, (self.num_groups, -1)), (self.group_size,), eps=self.eps).flatten(-2)
        if self.weight is None or self.bias is None:
            return y
        return torch.addcmul(self.bias.to(y.dtype), y, self.weight.to(y.dtype))


class GroupNorm(SampleNorm):
    """Group normalization: zero mean and unit variance over each group of features of a sample.

    y = (x − mean) / sqrt(var + eps) · gamma + beta, mean and biased variance over the features of a group and, for the
    scope "sample", over all of the sample's positions.

    Args:
        num_groups: the features are split into this many groups; it must divide their number.
        group_size: instead of `num_groups`, the features of each group.
        image_scope, sequence_scope, affine, eps, weight: see `SampleNorm`.

    Raises:
        ValueError: not exactly one of `num_groups` and `group_size`, or one below 1.

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

    def indivisible(self, num_features: int) -> str | None:
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
        image_scope: "sample", over (C, H, W), which is the layer norm of the group-norm paper; or "position", over C
            at each pixel, as in ConvNeXt. They are different functions.
        sequence_scope: "position", each step on its own, as in transformers; or "sample", over all valid steps.
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
            return self.at_each_position(x)
        x = precise(x)
        grouped = self.grouped(x)
        square = mean_square(grouped, self.dims(grouped), self.beside_groups(valid))
        return self.scale_and_shift((grouped * torch.rsqrt(square + self.eps)).view_as(x))

    def each_position(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.weight.to(x.dtype)  # torch's fused kernel wants one dtype
        return F.rms_norm(x, (self.num_features,), gain, self.eps)


class RMSNorm(SampleNorm):
    """Root mean square normalization: unit mean square over all features of each position, or of a sample.

    y = x / sqrt(mean(x²) + eps) · gamma. There is no mean to subtract and no shift to learn: the modules before it keep
    their bias.

    Args:
        image_scope: "sample", over (C, H, W); or "position", over C at each pixel.
        sequence_scope: "position", each step on its own; or "sample", over all valid steps.
        affine: learn a gain for each feature.
        eps, weight: see `Norm`. The eps is inside the root.

    References:
        Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
    """

    measures = "mean square"
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
