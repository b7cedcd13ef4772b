"""What every normalization shares: the factory a model receives and the layers it hands out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from ablab.norms.weight import PlainWeight, WeightReparametrization

Layout = Literal["image", "sequence"]
Site = Literal["input", "recurrent", "cell"]
Scope = Literal["sample", "position"]


class NormLayer(nn.Module):
    """A normalization of one tensor layout.

    Shape:
        - image: `(N, C, *spatial)`, features in dimension 1.
        - sequence: `(N, L, C)`, features last.
        - inside a recurrence: `(N, C)` at one time step, or `(N, T, C)` for all steps at once.

    `valid` `(N, L)` is True where a sequence is real and False where it is padding; padding enters no statistic.
    `step` is the time step of an `(N, C)` input; only statistics that are kept per step look at it.
    """

    weight_decay: tuple[str, ...] = ()  # gains and shifts are never decayed
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, *, eps: float, affine: bool, gain: float = 1.0) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.full((num_features,), gain)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        raise NotImplementedError

    def scale_and_shift(self, y: Tensor) -> Tensor:
        """Apply gamma and beta, where there are any, to normalized features in the last dimension."""
        return y if self.weight is None or self.bias is None else y * self.weight + self.bias

    def check_features(self, x: Tensor, dim: int) -> None:
        """Refuse a tensor whose features do not lie where the layout says."""
        if x.dim() < 2 or x.shape[dim] != self.num_features:
            raise ValueError(
                f"a norm of {self.num_features} features got a tensor of shape {tuple(x.shape)}, whose dimension {dim} "
                f"should hold them; give the features there, or build the norm for another layout"
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}"


class Refused(nn.Module):
    """Stands where a norm is not defined, so that all such places of a model can be reported together."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        raise ValueError(self.reason)


class Norm(ABC):
    """The one object by which a model normalizes; a model never asks which norm it holds.

    Args:
        affine: learn a gain and a shift for each feature (gamma and beta).
        eps: added to the variance before the root.
        weight: how weights are reparametrized, beside what happens to the activations; None leaves them as they are.
    """

    def __init__(
        self, *, affine: bool = True, eps: float = 1e-5, weight: WeightReparametrization | None = None
    ) -> None:
        if eps <= 0:
            raise ValueError(f"eps={eps}: the variance needs something added before the root, for example 1e-5")
        self.affine = affine
        self.eps = eps
        self.weight = weight or PlainWeight()

    # What a model asks for ------------------------------------------------------------------------------------

    def __call__(self, num_features: int, layout: Layout, *, causal: bool = False) -> nn.Module:
        """A norm for `num_features` features of an image or a sequence.

        Args:
            num_features: the features (channels) that the layer sees.
            layout: where they lie, "image" `(N, C, *spatial)` or "sequence" `(N, L, C)`.
            causal: a position must not see later ones; a norm that would leak them is refused.

        Returns:
            The layer, or a `Refused` that holds the reason why there is none (see `refusals`).
        """
        refusal = self.refusal(num_features, layout, causal=causal)
        return Refused(refusal) if refusal else self.layer(num_features, layout)

    def recurrent(self, num_features: int, site: Site, *, num_steps: int) -> nn.Module:
        """A norm for a site inside a recurrence, called once a time step with `(N, C)` and the step.

        Args:
            num_features: the features at the site (the stacked gates, or the cell).
            site: "input" (of the input's projection), "recurrent" (of the state's), or "cell" (before the output gate).
            num_steps: the longest sequence, for norms that keep statistics for each step.
        """
        refusal = self.recurrent_refusal(num_features)
        return Refused(refusal) if refusal else self.recurrent_layer(num_features, site, num_steps)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Reparametrize the weight of a linear or convolution; call it after the weight has been initialized."""
        return self.weight(module)

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None:
        """Let a residual branch that ends in `module`, then `layer`, start as zero (Goyal et al. 2017).

        The norm's gain becomes zero; where there is no norm, the module's weight does (its gain g under weight norm).
        A norm without a gain is left alone: a zero weight before it would be normalized by eps alone.
        """
        gain = getattr(layer, "weight", None)
        if isinstance(gain, Tensor):
            nn.init.zeros_(gain)
        elif not isinstance(layer, NormLayer):
            self.weight.zero_(module)

    @property
    def needs_bias(self) -> bool:
        """Whether the module before a norm keeps its own bias: yes, unless the norm adds a shift itself."""
        return not self.affine

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    # What a norm is made of -----------------------------------------------------------------------------------

    @abstractmethod
    def layer(self, num_features: int, layout: Layout) -> nn.Module:
        """The layer itself, for a place that `refusal` has let pass."""

    @abstractmethod
    def recurrent_layer(self, num_features: int, site: Site, num_steps: int) -> nn.Module:
        """The layer inside a recurrence, for a place that `recurrent_refusal` has let pass."""

    def refusal(self, num_features: int, layout: Layout, *, causal: bool) -> str | None:
        """Why this norm is not defined there, with the remedy; None where it is."""
        return None

    def recurrent_refusal(self, num_features: int) -> str | None:
        """Why this norm is not defined inside a recurrence, with the remedy; None where it is."""
        return None


def refusals(model: nn.Module) -> dict[str, list[str]]:
    """Why the norm is not defined in `model`, each reason with the names of the places."""
    reasons: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Refused):
            reasons.setdefault(module.reason, []).append(name)
    return reasons


def masked_moments(x: Tensor, valid: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the valid values of `x` over `dims`, each kept as a dimension of size 1.

    `valid` broadcasts against `x`. What stands in padding does not matter, not even NaN.
    """
    count = valid.expand_as(x).sum(dims, keepdim=True)
    mean = torch.where(valid, x, 0.0).sum(dims, keepdim=True) / count.clamp(min=1)
    square = torch.where(valid, x - mean, 0.0).square().sum(dims, keepdim=True)
    return mean, square / count.clamp(min=1), count
