"""Protocols between models and the rest. `ablab.norms.Norm` implements `NormFactory`; models never import it."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn


class NormFactory(Protocol):
    """A factory of norm layers; see `ablab.norms.Norm` for the documentation of each method."""

    @property
    def needs_bias(self) -> bool: ...

    def __call__(
        self,
        num_features: int,
        layout: Literal["image", "sequence", "heads", "vector"],
        *,
        causal: bool = False,
        activation: nn.Module | None = None,
    ) -> nn.Module: ...

    def recurrent(
        self, num_features: int, site: Literal["input", "recurrent", "cell"], *, num_steps: int
    ) -> nn.Module: ...

    def wrap(self, module: nn.Module) -> nn.Module: ...

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None: ...


@runtime_checkable
class InitFromData(Protocol):
    """A model with data-dependent initialization: a run calls it with training samples before training starts.

    The method must store its result in parameters or buffers, so that checkpoints contain it.
    """

    def init_from_data(self, inputs: Tensor) -> None: ...
