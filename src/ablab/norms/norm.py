"""Base class of the norm factories that models receive."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from ablab.norms.layer import Layout, Statistic, UndefinedNorm
from ablab.norms.weight import PlainWeight, WeightReparametrization

Site = Literal["input", "recurrent", "cell"]

collecting_refusals: ContextVar[bool] = ContextVar("collecting_refusals", default=False)


@contextmanager
def collect_refusals() -> Iterator[None]:
    """Allow building a model with undefined norms, so that `find_norm_problems` can report all of them at once."""
    token = collecting_refusals.set(True)
    try:
        yield
    finally:
        collecting_refusals.reset(token)


def refuse(reason: str) -> UndefinedNorm:
    if not collecting_refusals.get():
        raise ValueError(reason)
    return UndefinedNorm(reason)


def mark_as_norm(layer: nn.Module) -> nn.Module:
    """Mark a layer as made by a `Norm`, whatever its class, so that `norm_layers` finds it in a model."""
    layer.is_made_by_norm = True  # type: ignore[assignment]
    return layer


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that a `Norm` has made, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "is_made_by_norm", False)}


def builtin_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norm layers that a model builds itself, such as `nn.BatchNorm2d`, by name."""
    made = {part for layer in norm_layers(model).values() for part in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and module not in made and not any(module.children())
    }


class Norm(ABC):
    """A factory of norm layers: the one object by which a model normalizes, without knowing which norm it is.

    A subclass declares its `statistics` and makes its `layer`. The input checks, the tables of docs/norms.md, the tests
    and the record of a run are derived from the statistics.

    Args:
        affine: learn a gain and a shift per feature (gamma and beta).
        eps: added to the variance, or to the mean square, before the square root.
        weight: a reparametrization of the weights, in addition to the activation norm; None for none.
    """

    supports_masks: ClassVar[bool] = True  # padding is excluded from all statistics

    def __init__(
        self, *, affine: bool = True, eps: float = 1e-5, weight: WeightReparametrization | None = None
    ) -> None:
        if eps <= 0:
            raise ValueError(f"eps={eps}: the variance needs something added before the root, for example 1e-5")
        self.affine = affine
        self.eps = eps
        self.weight = weight or PlainWeight()

    # Called by models -----------------------------------------------------------------------------------------

    def __call__(
        self, num_features: int, layout: Layout, *, causal: bool = False, activation: nn.Module | None = None
    ) -> nn.Module:
        """Make a norm layer that includes the nonlinearity after it.

        Args:
            num_features: number of features (channels).
            layout: shape of the input: "image" `(N, C, *spatial)`, "sequence" `(N, L, C)`, "heads" `(N, heads, L, C)`
                or "vector" `(N, C)`.
            causal: whether a position must not depend on later ones; a norm that would leak them is an error.
            activation: the nonlinearity after the norm; norms with their own nonlinearity replace it.

        Raises:
            ValueError: the layout is unknown, or the norm is not defined there; within `collect_refusals`, returns an
                `UndefinedNorm` instead.
        """
        known = [name for name in get_args(Layout) if name != "recurrence"]
        if layout not in known:
            raise ValueError(f"layout={layout}: there are {', '.join(known)}; inside a recurrence, Norm.recurrent")
        if reason := self.refusal(num_features, layout, causal=causal):
            return mark_as_norm(refuse(reason))
        return mark_as_norm(self.layer(num_features, layout, activation=activation))

    def recurrent(self, num_features: int, site: Site, *, num_steps: int) -> nn.Module:
        """Make a norm layer inside a recurrence, called with `(N, C)` and the step, or `(N, T, C)` for all steps.

        Args:
            num_features: number of features at the site (the stacked gates, or the cell).
            site: "input" (projection of the input), "recurrent" (projection of the state) or "cell" (cell state before
                the output gate).
            num_steps: length of the longest sequence, for norms with per-step statistics.

        Raises:
            ValueError: the site is unknown, or the norm is not defined inside a recurrence (see `__call__`).
        """
        if site not in get_args(Site):
            raise ValueError(f"site={site}: there are {', '.join(get_args(Site))}")
        if reason := self.refusal(num_features, "recurrence"):
            return mark_as_norm(refuse(reason))
        return mark_as_norm(self.layer(num_features, "recurrence", num_steps=num_steps))

    def wrap(self, module: nn.Module) -> nn.Module:
        """Reparametrize the weight of a linear layer or convolution in place; call it after initialization."""
        return self.weight(module)

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None:
        """Zero-initialize a residual branch that ends in `module`, then `layer` (Goyal et al. 2017).

        Sets the norm's gain to zero. Without a gain, sets the module's weight to zero (the length g under weight norm),
        unless the norm divides by a statistic: zero inputs would then be divided by sqrt(eps).
        """
        gain = getattr(layer, "weight", None)
        if isinstance(gain, Tensor):
            if gain.requires_grad:
                nn.init.zeros_(gain)
        elif not any(statistic.scales for statistic in getattr(layer, "statistics", ())):
            self.weight.zero_(module)

    @property
    def reparametrizes(self) -> bool:
        """Return whether `wrap` reparametrizes weights."""
        return not isinstance(self.weight, PlainWeight)

    @property
    def needs_bias(self) -> bool:
        """Return whether the module before a norm needs its own bias, because the norm adds no shift."""
        return not self.has_shift

    # Declared by subclasses -----------------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        """Return the statistics that the norm computes in a layout; empty for elementwise functions."""

    @abstractmethod
    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> nn.Module:
        """Make the layer, after `refusal` has accepted its place; `num_steps` is given only inside a recurrence."""

    @property
    def has_gain(self) -> bool:
        return self.affine

    @property
    def has_shift(self) -> bool:
        return self.affine

    def features_in_group(self, num_features: int) -> int:
        """Return the number of features in a group, for statistics over groups of features."""
        return 1

    def normalization_batch_size(self, micro_batch: int, world_size: int) -> int:
        """Return the number of samples per statistic in training; 1 if samples are normalized independently.

        Args:
            micro_batch: samples per forward pass of one process.
            world_size: number of processes.

        References:
            Wu & Johnson 2021 (the term), https://arxiv.org/abs/2105.07576
        """
        return micro_batch if self.sees_batch else 1

    # Derived from the statistics ------------------------------------------------------------------------------

    @property
    def sees_batch(self) -> bool:
        """Return whether the output for a sample depends on the other samples of its batch, in training."""
        return any(statistic.batch for statistic in self.statistics("image"))

    @property
    def train_equals_eval(self) -> bool:
        """Return whether training and evaluation give the same output for the same input."""
        running = any(statistic.source == "running" for statistic in self.statistics("image"))
        return not running and not self.weight.has_state

    @property
    def has_running_state(self) -> bool:
        """Return whether the norm has buffers: running averages, or the vectors of a power iteration."""
        return any(statistic.source != "input" for statistic in self.statistics("image")) or self.weight.has_state

    def refusal(self, num_features: int, layout: Layout, *, causal: bool = False) -> str | None:
        """Return an error message if this norm is not defined in a place, else None."""
        for statistic in self.statistics(layout):
            if statistic.source == "stored":
                continue
            if causal and statistic.positions:
                remedy = self.per_position_override(layout) or "choose a norm whose statistics stay within a step"
                return f"a {statistic} would leak the future into a causal model; {remedy}"
            if layout == "heads" and (statistic.batch or statistic.positions):
                return (
                    f"queries and keys are normalized within one head of one step, and not by {statistic}; "
                    "choose a norm over all features"
                )
            values = {"each": 1, "group": self.features_in_group(num_features), "all": num_features}[statistic.features]
            if values == 1 and not statistic.batch and not statistic.positions:
                prefixes = {"recurrence": "inside a recurrence, where a step stands alone, ", "vector": "in a vector "}
                where = prefixes.get(layout, "")
                return (
                    f"{where}the {statistic.name} of each feature would be taken over a single value, and the output "
                    "would not depend on how large it is; choose a norm over several features or over the batch"
                )
        return None

    def per_position_override(self, layout: Layout) -> str | None:
        """Return the override that restricts the statistics to a single position, if there is one."""
        return None

    def __repr__(self) -> str:
        """Return the class name and the settings that differ from their defaults."""
        parameters = inspect.signature(type(self)).parameters.values()
        values = {p.name: getattr(self, p.name, p.default) for p in parameters if p.name != "weight"}
        chosen = [f"{p.name}={values[p.name]}" for p in parameters if values.get(p.name, p.default) != p.default]
        return f"{type(self).__name__}({', '.join([*chosen, *[f'weight={self.weight!r}'] * self.reparametrizes])})"
