"""No activation norm: the baseline, also used for pure weight reparametrizations."""

from __future__ import annotations

from torch import Tensor, nn

from ablab.norms.layer import Layout, Statistic
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization


class NoNorm(Norm):
    """A factory of identity layers: `norm=none` removes the norm only, and the modules before it keep their bias.

    Args:
        weight: a reparametrization of the weights; `norm=weightnorm` is this class with `WeightNorm`.
    """

    def __init__(self, *, weight: WeightReparametrization | None = None) -> None:
        super().__init__(affine=False, weight=weight)

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        return ()

    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> nn.Module:
        return Identity(activation)


class Identity(nn.Module):
    """An identity with the signature of a norm layer; applies the nonlinearity after the norm, if any."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        return x if self.activation is None else self.activation(x)
