"""What a model may ask of the norm it is given. `ablab.norms.Norm` fulfils it; models never import that."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn


class NormFactory(Protocol):
    """Makes the norms of one model; each method is described where it is implemented, in `ablab.norms.norm`."""

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
    """A model whose first weights depend on its data: a run shows it training samples before the training begins.

    What it makes of them is among its weights, so a checkpoint has it.
    """

    def init_from_data(self, inputs: Tensor) -> None: ...
