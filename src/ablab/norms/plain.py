"""No activation norm at all: the baseline, and the home of pure weight reparametrizations."""

from __future__ import annotations

from torch import Tensor, nn

from ablab.norms.layer import Layout, Statistic
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization


class NoNorm(Norm):
    """Hands out identities. `norm=none` removes the norm and nothing else: the modules before it keep their bias.

    Args:
        weight: how weights are reparametrized; `norm=weightnorm` is this class with weight norm here.
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
    """Takes what a norm layer takes, and returns the input, behind the nonlinearity where there is one."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        return x if self.activation is None else self.activation(x)
