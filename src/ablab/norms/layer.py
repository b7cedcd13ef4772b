"""Base class of all norm layers: declared statistics, gain and shift, and input checks."""

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
WITHOUT_POSITIONS = ("vector", "recurrence")  # layouts without pixels or steps to average over


@dataclass(frozen=True)
class Statistic:
    """A statistic that a norm computes, and the values of a tensor that it is computed over.

    The checks, documentation and tests of a norm are all derived from its statistics; see `Norm.statistics`.

    Args:
        name: "mean and variance", "mean", "variance" or "mean square".
        batch: the set of samples it is taken over ("the batch", "each ghost batch"); "" for a single sample.
        positions: whether it is taken over the pixels of an image or the steps of a sequence.
        features: whether it is taken over each feature, a group of features, or all features.
        source: "input" if always computed from the input; "running" if computed from the input in training and
            replaced by running averages in evaluation; "stored" if never computed from the input.
    """

    name: str
    batch: str = ""
    positions: bool = False
    features: Literal["each", "group", "all"] = "each"
    source: Literal["input", "running", "stored"] = "input"

    @property
    def scales(self) -> bool:
        """Return whether the norm divides by this statistic."""
        return self.name != "mean"

    def __str__(self) -> str:
        if self.source == "stored":
            return f"stored {self.name}"
        axes = [self.batch] * bool(self.batch) + ["all positions"] * self.positions
        axes += {"each": [], "group": ["a group of features"], "all": ["all features"]}[self.features]
        return f"{self.name} over {' and '.join(axes) or 'nothing'}"


class NormLayer(nn.Module):
    """A norm layer for one tensor layout, with the nonlinearity after it, if any.

    Subclasses implement `normalize`, which is called after the shape of the input has been checked.

    Args:
        norm: the factory that makes the layer; decides whether it has gain and shift.
        num_features: number of features (channels) of the input.
        layout: position of the feature dimension, see below.
        gain: initial value of the gain.
        activation: the nonlinearity after the norm.

    Shape:
        - image: `(N, C, *spatial)` with one, two or three spatial dimensions, contiguous or channels_last.
        - sequence: `(N, L, C)`.
        - heads: `(N, heads, L, C)`, queries or keys of attention.
        - vector: `(N, C)`, features without positions.
        - recurrence: `(N, C)` at one time step, or `(N, T, C)` for all steps at once.

    `valid` `(N, L)` is True for real steps and False for padding, which is excluded from all statistics. `step` is the
    time step of an `(N, C)` input; only norms with per-step statistics use it.

    Raises:
        ValueError: the input does not have the layout's shape, or a statistic would be taken over a single value.
    """

    weight_decay: tuple[str, ...] = ()  # names of decayed parameters, see ablab.optim.groups; a norm has none
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
        self.supports_masks = norm.supports_masks
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
        """Normalize `x` and apply gain and shift; the result may have a higher precision than `x`."""
        raise NotImplementedError

    # Input checks ---------------------------------------------------------------------------------------------

    def problem(
        self, shape: torch.Size, mask: torch.Size | None = None, num_processes: int | None = None
    ) -> str | None:
        """Return an error message if an input and a mask of these shapes are invalid, else None.

        `num_processes` is the world size to assume in a dry run, before the processes have been started.
        """
        if len(shape) not in DIMENSIONS[self.layout] or shape[self.feature_dim] != self.num_features:
            return (
                f"a norm of {self.num_features} features in the layout {self.layout} got a tensor of shape "
                f"{tuple(shape)}; dimension {self.feature_dim} must hold the features: give them there, "
                "or build the norm for another layout"
            )
        if mask is not None and (problem := self.mask_problem(shape, mask)):
            return problem
        for statistic in self.statistics:
            if self.values(statistic, shape, num_processes) == 1:
                return self.single_value_problem(statistic, shape)
        return None

    def mask_problem(self, shape: torch.Size, mask: torch.Size) -> str | None:
        if self.layout in ("image", "heads", "vector"):
            return f"a mask marks the real steps of a sequence, and the layout {self.layout} has none; give valid=None"
        if not self.supports_masks:
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
        """Return the number of input values that one `statistic` is taken over; 0 if it does not use the input."""
        if statistic.source == "stored" or (statistic.source == "running" and not self.training):
            return 0
        count = 1
        if statistic.features != "each":
            count = self.num_features if statistic.features == "all" else self.group_size
        if statistic.batch:
            count *= self.samples_per_statistic(shape[0], num_processes)
        if statistic.positions:
            count *= math.prod(shape[2:]) if self.layout == "image" else shape[1]
        return count

    def samples_per_statistic(self, batch: int, num_processes: int | None) -> int:
        """Return the number of samples in one statistic, given the batch size of one process."""
        return batch

    def single_value_problem(self, statistic: Statistic, shape: torch.Size) -> str:
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

    # Helpers for subclasses -----------------------------------------------------------------------------------

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Reshape a parameter `(C,)` to broadcast against `x`."""
        return parameter.view(-1, *[1] * (x.dim() - 2)) if self.layout == "image" else parameter

    def scale_and_shift(self, y: Tensor) -> Tensor:
        """Apply gain and shift, if the layer has them."""
        if self.weight is not None:
            y = y * self.broadcast(self.weight, y)
        return y if self.bias is None else y + self.broadcast(self.bias, y)

    def extra_repr(self) -> str:
        affine = [name for name in ("weight", "bias") if getattr(self, name) is not None]
        return f"{self.num_features}, layout={self.layout}, eps={self.eps}, affine={'+'.join(affine) or 'none'}"


class UndefinedNorm(nn.Module):
    """A placeholder where a norm is not defined, so that all such places of a model can be reported at once."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        raise ValueError(self.reason)


def moments(x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and count of the valid values of `x` over `dims`, with `keepdim=True`.

    `valid` broadcasts against `x`. Values in the padding are ignored, even NaN.
    """
    if valid is None:
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return mean, var, torch.full_like(mean, x.numel() // mean.numel())
    count = valid.expand_as(x).sum(dims, keepdim=True).to(x.dtype)
    mean = torch.where(valid, x, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)
    square = torch.where(valid, x - mean, 0.0).square().sum(dims, keepdim=True)
    return mean, square / count.clamp(min=1), count


def mean_square(x: Tensor, dims: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
    """Return the mean square of the valid values of `x` over `dims`, with `keepdim=True`."""
    if valid is None:
        return x.square().mean(dims, keepdim=True)
    count = valid.expand_as(x).sum(dims, keepdim=True).to(x.dtype)
    return torch.where(valid, x, 0.0).square().sum(dims, keepdim=True) / count.clamp(min=1)
