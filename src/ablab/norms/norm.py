"""The factory that a model receives: all that a model ever knows about normalization."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from ablab.norms.layer import Layout, Refused, Statistic
from ablab.norms.weight import PlainWeight, WeightReparametrization

Site = Literal["input", "recurrent", "cell"]


collecting_refusals: ContextVar[bool] = ContextVar("collecting_refusals", default=False)


@contextmanager
def collecting() -> Iterator[None]:
    """Let a model be built whose norm is not defined everywhere, so that `problems` finds all of its places."""
    token = collecting_refusals.set(True)
    try:
        yield
    finally:
        collecting_refusals.reset(token)


def refused(reason: str) -> Refused:
    if not collecting_refusals.get():
        raise ValueError(reason)
    return Refused(reason)


def placed(layer: nn.Module) -> nn.Module:
    """Mark a layer as one of the norm's, whatever its class, so that `places` finds it in a model."""
    layer.is_of_norm = True  # type: ignore[assignment]
    return layer


def places(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that its norm has made, by their names."""
    return {name: module for name, module in model.named_modules() if getattr(module, "is_of_norm", False)}


def own_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norm layers that a model has made by itself, torch's for example, by their names."""
    made = {part for layer in places(model).values() for part in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and module not in made and not any(module.children())
    }


class Norm(ABC):
    """The one object by which a model normalizes; a model never asks which norm it holds.

    A new norm says what its `statistics` are and makes its `layer`. From the statistics follow what is refused, what
    is written in docs/norms.md, what the tests expect of it and what a run records.

    Args:
        affine: learn a gain and a shift for each feature (gamma and beta).
        eps: added to the variance, or to the mean square, before the root.
        weight: how weights are reparametrized, beside what happens to the activations; None leaves them as they are.
    """

    honours_masks: ClassVar[bool] = True  # padding enters no statistic

    def __init__(
        self, *, affine: bool = True, eps: float = 1e-5, weight: WeightReparametrization | None = None
    ) -> None:
        if eps <= 0:
            raise ValueError(f"eps={eps}: the variance needs something added before the root, for example 1e-5")
        self.affine = affine
        self.eps = eps
        self.weight = weight or PlainWeight()

    # What a model asks for ------------------------------------------------------------------------------------

    def __call__(
        self, num_features: int, layout: Layout, *, causal: bool = False, activation: nn.Module | None = None
    ) -> nn.Module:
        """A norm for `num_features` features, and the nonlinearity behind it.

        Args:
            num_features: the features (channels) that the layer sees.
            layout: where they lie, "image" `(N, C, *spatial)`, "sequence" `(N, L, C)`, "heads" `(N, heads, L, C)` or
                "vector" `(N, C)`.
            causal: a position must not see later ones; a norm that would leak them is refused.
            activation: the nonlinearity that follows; a norm that brings its own puts that in its place.

        Raises:
            ValueError: a layout that there is not, or a place where this norm is not defined; within `collecting` such
                a place gets a `Refused`.
        """
        known = [name for name in get_args(Layout) if name != "recurrence"]
        if layout not in known:
            raise ValueError(f"layout={layout}: there are {', '.join(known)}; inside a recurrence, Norm.recurrent")
        if reason := self.refusal(num_features, layout, causal=causal):
            return placed(refused(reason))
        return placed(self.layer(num_features, layout, activation=activation))

    def recurrent(self, num_features: int, site: Site, *, num_steps: int) -> nn.Module:
        """A norm for a site inside a recurrence, called with `(N, C)` and the step, or `(N, T, C)` for all steps.

        Args:
            num_features: the features at the site (the stacked gates, or the cell).
            site: "input" (the projection of the input), "recurrent" (of the state) or "cell" (before the output gate).
            num_steps: the longest sequence, for norms that keep statistics for each step.

        Raises:
            ValueError: a site that there is not, or a norm that is not defined inside a recurrence, as above.
        """
        if site not in get_args(Site):
            raise ValueError(f"site={site}: there are {', '.join(get_args(Site))}")
        if reason := self.refusal(num_features, "recurrence"):
            return placed(refused(reason))
        return placed(self.layer(num_features, "recurrence", num_steps=num_steps))

    def wrap(self, module: nn.Module) -> nn.Module:
        """Reparametrize the weight of a linear or convolution; call it after the weight has been initialized."""
        return self.weight(module)

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None:
        """Let a residual branch that ends in `module`, then `layer`, start as zero (Goyal et al. 2017).

        The norm's gain becomes zero; where nothing divides by a statistic, the module's weight does (its gain g under
        weight norm). What divides and has no gain to learn is left alone: a zero before it is divided by eps alone.
        """
        gain = getattr(layer, "weight", None)
        if isinstance(gain, Tensor):
            if gain.requires_grad:
                nn.init.zeros_(gain)
        elif not any(statistic.scales for statistic in getattr(layer, "statistics", ())):
            self.weight.zero_(module)

    @property
    def wraps(self) -> bool:
        """Whether `wrap` changes anything."""
        return not isinstance(self.weight, PlainWeight)

    @property
    def needs_bias(self) -> bool:
        """Whether the module before a norm keeps its own bias: yes, unless the norm adds a shift itself."""
        return not self.has_shift

    # What a norm is -------------------------------------------------------------------------------------------

    @abstractmethod
    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        """What the norm measures in a layout; nothing where it works on each value alone."""

    @abstractmethod
    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> nn.Module:
        """The layer itself, for a place that `refusal` has let pass; `num_steps` only inside a recurrence."""

    @property
    def has_gain(self) -> bool:
        return self.affine

    @property
    def has_shift(self) -> bool:
        return self.affine

    def features_in_group(self, num_features: int) -> int:
        """The features that share one statistic, where it is taken over a group of them."""
        return 1

    def batch_seen(self, micro_batch: int, world_size: int) -> int:
        """The samples that one statistic is taken over in training: 1 where samples do not see each other.

        Args:
            micro_batch: the samples that one process passes forward at once.
            world_size: the processes.
        """
        return micro_batch if self.sees_batch else 1

    # What follows from it -------------------------------------------------------------------------------------

    @property
    def sees_batch(self) -> bool:
        """Whether the output for a sample depends on the others of its batch, in training."""
        return any(statistic.batch for statistic in self.statistics("image"))

    @property
    def train_equals_eval(self) -> bool:
        """Whether the same input has the same output in training and in evaluation."""
        running = any(statistic.source == "running" for statistic in self.statistics("image"))
        return not running and not self.weight.has_state

    @property
    def has_running_state(self) -> bool:
        """Whether it keeps something beside what it learns: running averages, or vectors of a power iteration."""
        return any(statistic.source != "input" for statistic in self.statistics("image")) or self.weight.has_state

    def refusal(self, num_features: int, layout: Layout, *, causal: bool = False) -> str | None:
        """Why this norm is not defined in a place, with the remedy; None where it is."""
        for statistic in self.statistics(layout):
            if statistic.source == "stored":
                continue
            if causal and statistic.positions:
                remedy = self.within_position(layout) or "choose a norm whose statistics stay within a step"
                return f"a {statistic} would leak the future into a causal model; {remedy}"
            if layout == "heads" and (statistic.batch or statistic.positions):
                return (
                    f"queries and keys are normalized within one head of one step, and not by {statistic}; "
                    "choose a norm over all features"
                )
            values = {"each": 1, "group": self.features_in_group(num_features), "all": num_features}[statistic.features]
            if values == 1 and not statistic.batch and not statistic.positions:
                alone = {"recurrence": "inside a recurrence, where a step stands alone, ", "vector": "in a vector "}
                where = alone.get(layout, "")
                return (
                    f"{where}the {statistic.name} of each feature would be taken over a single value, and the output "
                    "would not depend on how large it is; choose a norm over several features or over the batch"
                )
        return None

    def within_position(self, layout: Layout) -> str | None:
        """The setting by which the statistics stay within a position, where there is one."""
        return None

    def __repr__(self) -> str:
        """The settings that are not the default ones."""
        parameters = inspect.signature(type(self)).parameters.values()
        values = {p.name: getattr(self, p.name, p.default) for p in parameters if p.name != "weight"}
        chosen = [f"{p.name}={values[p.name]}" for p in parameters if values.get(p.name, p.default) != p.default]
        return f"{type(self).__name__}({', '.join([*chosen, *[f'weight={self.weight!r}'] * self.wraps])})"
