"""What every norm layer shares: what its statistics are taken over, its gain and shift, and the checks of its input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ablab.norms.norm import Norm

Layout = Literal["image", "sequence", "heads", "vector", "recurrence"]
DIMENSIONS = {"image": (3, 4, 5), "sequence": (3,), "heads": (4,), "vector": (2,), "recurrence": (2, 3)}
WITHOUT_POSITIONS = ("vector", "recurrence")  # a row of features, or one step, has neither pixels nor other steps


@dataclass(frozen=True)
class Statistic:
    """What a norm measures, and the values of a tensor that one such measurement is taken over.

    All that is said, checked or tested about a norm follows from its statistics: see `Norm.statistics`.

    Args:
        name: "mean and variance", "mean", "variance" or "mean square".
        batch: over the samples of this batch ("the batch", "each ghost batch"); "" is over one sample.
        positions: over the pixels of an image, or the steps of a sequence.
        features: over each feature alone, over a group of them, or over all.
        source: "input", always taken from the input; "running", from the input in training and from its running
            averages in evaluation; "stored", never from the input.
    """

    name: str
    batch: str = ""
    positions: bool = False
    features: Literal["each", "group", "all"] = "each"
    source: Literal["input", "running", "stored"] = "input"

    @property
    def scales(self) -> bool:
        """Whether the norm divides by it."""
        return self.name != "mean"

    def __str__(self) -> str:
        if self.source == "stored":
            return f"stored {self.name}"
        axes = [self.batch] * bool(self.batch) + ["all positions"] * self.positions
        axes += {"each": [], "group": ["a group of features"], "all": ["all features"]}[self.features]
        return f"{self.name} over {' and '.join(axes) or 'nothing'}"


class NormLayer(nn.Module):
    """A norm of one layout, and the nonlinearity behind it where there is one.

    A subclass computes `normalize`; features, number of values and dtype have been checked before.

    Args:
        norm: what hands out the layer; it says whether there are gain and shift.
        num_features: the features (channels) that the layer sees.
        layout: where they lie.
        gain: where the gain starts.
        activation: the nonlinearity behind the norm.

    Shape:
        - image: `(N, C, *spatial)`, one, two or three spatial dimensions, contiguous or channels_last.
        - sequence: `(N, L, C)`.
        - heads: `(N, heads, L, C)`, the queries or keys of attention.
        - vector: `(N, C)`, features without positions.
        - recurrence: `(N, C)` at one time step, or `(N, T, C)` for all steps at once.

    `valid` `(N, L)` is True where a sequence is real and False where it is padding; padding enters no statistic.
    `step` is the time step of an `(N, C)` input; only statistics that are kept for each step look at it.

    Raises:
        ValueError: the features lie elsewhere, or one statistic would be taken over a single value.
    """

    weight_decay: tuple[str, ...] = ()  # gains, shifts and what else a norm learns are never decayed
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        norm: Norm,
        num_features: int,
        layout: Layout,
        *,
        gain: float = 1.0,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.layout = layout
        self.statistics = norm.statistics(layout)
        self.group_size = norm.features_in_group(num_features)
        self.feature_dim = 1 if layout == "image" else -1
        self.honours_masks = norm.honours_masks
        self.eps = norm.eps
        self.weight = nn.Parameter(torch.full((num_features,), gain)) if norm.has_gain else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if norm.has_shift else None
        self.activation = activation

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        if problem := self.problem(x.shape, None if valid is None else valid.shape):
            raise ValueError(problem)
        y = self.normalize(x, valid, step).to(x.dtype)
        return y if self.activation is None else self.activation(y)

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        """The norm itself, gain and shift included; the result may have more precision than `x`."""
        raise NotImplementedError

    # What an input must be ------------------------------------------------------------------------------------

    def problem(
        self, shape: torch.Size, mask: torch.Size | None = None, num_processes: int | None = None
    ) -> str | None:
        """Why an input of this shape, with a mask of that shape, is refused, and the remedy; None where it is not.

        `num_processes` is that of a run that has not started them yet.
        """
        if len(shape) not in DIMENSIONS[self.layout] or shape[self.feature_dim] != self.num_features:
            return (
                f"a norm of {self.num_features} features in the layout {self.layout} got a tensor of shape "
                f"{tuple(shape)}; dimension {self.feature_dim} must hold the features: give them there, "
                "or build the norm for another layout"
            )
        if mask is not None and (problem := self.problem_of_mask(shape, mask)):
            return problem
        for statistic in self.statistics:
            if self.values(statistic, shape, num_processes) == 1:
                return self.too_few(statistic, shape)
        return None

    def problem_of_mask(self, shape: torch.Size, mask: torch.Size) -> str | None:
        if self.layout in ("image", "heads", "vector"):
            return f"a mask marks the real steps of a sequence, and the layout {self.layout} has none; give valid=None"
        if not self.honours_masks:
            return (
                "this norm takes padding for values, and the batch has padding; choose a norm that honours masks, or "
                "data whose sequences are equally long"
            )
        if mask != shape[:-1]:
            return (
                f"a mask of shape {tuple(mask)} does not belong to an input of shape {tuple(shape)}; "
                f"give {tuple(shape[:-1])}"
            )
        return None

    def values(self, statistic: Statistic, shape: torch.Size, num_processes: int | None = None) -> int:
        """How many values of an input of this shape one `statistic` is taken over; 0 where it takes none."""
        if statistic.source == "stored" or (statistic.source == "running" and not self.training):
            return 0
        count = 1
        if statistic.features != "each":
            count = self.num_features if statistic.features == "all" else self.group_size
        if statistic.batch:
            count *= self.samples(shape[0], num_processes)
        if statistic.positions:
            count *= math.prod(shape[2:]) if self.layout == "image" else shape[1]
        return count

    def samples(self, batch: int, num_processes: int | None) -> int:
        """The samples of a process's batch, or of all processes', that enter one statistic."""
        return batch

    def too_few(self, statistic: Statistic, shape: torch.Size) -> str:
        remedy = (
            "raise data.batch_size (and drop a last batch of one sample), or choose a norm that does not look at the "
            "batch"
            if statistic.batch
            else "use larger inputs, fewer groups, or a norm over more values"
        )
        return (
            f"an input of shape {tuple(shape)} leaves a single value for each {statistic}, "
            f"and the output would not depend on how large it is; {remedy}"
        )

    # What subclasses compute with -----------------------------------------------------------------------------

    def beside(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter `(C,)` in the shape that broadcasts it against `x`."""
        return parameter.view(-1, *[1] * (x.dim() - 2)) if self.layout == "image" else parameter

    def scale_and_shift(self, y: Tensor) -> Tensor:
        """Apply gain and shift, where there are any."""
        if self.weight is not None:
            y = y * self.beside(self.weight, y)
        return y if self.bias is None else y + self.beside(self.bias, y)

    def extra_repr(self) -> str:
        affine = [name for name in ("weight", "bias") if getattr(self, name) is not None]
        return f"{self.num_features}, layout={self.layout}, eps={self.eps}, affine={'+'.join(affine) or 'none'}"


class Refused(nn.Module):
    """Stands where a norm is not defined, so that all such places of a model can be reported together."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        raise ValueError(self.reason)


def moments(x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the valid values of `x` over `dims`, each kept as a dimension of size 1.

    `valid` broadcasts against `x`. What stands in padding does not matter, not even NaN.
    """
    if valid is None:
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return mean, var, torch.full_like(mean, x.numel() // mean.numel())
    count = valid.expand_as(x).sum(dims, keepdim=True).to(x.dtype)
    mean = torch.where(valid, x, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)
    square = torch.where(valid, x - mean, 0.0).square().sum(dims, keepdim=True)
    return mean, square / count.clamp(min=1), count


def mean_square(x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
    """The mean of the valid values' squares over `dims`, each kept as a dimension of size 1."""
    if valid is None:
        return x.square().mean(dims, keepdim=True)
    count = valid.expand_as(x).sum(dims, keepdim=True).to(x.dtype)
    return torch.where(valid, x, 0.0).square().sum(dims, keepdim=True) / count.clamp(min=1)
