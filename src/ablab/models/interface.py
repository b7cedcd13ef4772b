"""What a model may ask of the norm it is given. `ablab.norms.Norm` fulfils it; models never import that."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import nn


class NormFactory(Protocol):
    """Makes the norms of one model; each method is described where it is implemented, in `ablab.norms.norm`."""

    @property
    def needs_bias(self) -> bool: ...

    def __call__(
        self,
        num_features: int,
        layout: Literal["image", "sequence", "heads"],
        *,
        causal: bool = False,
        activation: nn.Module | None = None,
    ) -> nn.Module: ...

    def recurrent(
        self, num_features: int, site: Literal["input", "recurrent", "cell"], *, num_steps: int
    ) -> nn.Module: ...

    def wrap(self, module: nn.Module) -> nn.Module: ...

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None: ...
