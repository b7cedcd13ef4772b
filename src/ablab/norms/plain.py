"""No activation norm at all: the baseline, and the home of pure weight reparametrizations."""

from __future__ import annotations

from torch import Tensor, nn

from ablab.norms.norm import Layout, Norm, Site
from ablab.norms.weight import WeightReparametrization


class NoNorm(Norm):
    """Hands out identities. `norm=none` removes the norm and nothing else: the modules before it keep their bias.

    Args:
        weight: how weights are reparametrized; `norm=weightnorm` is this class with weight norm here.
    """

    def __init__(self, *, weight: WeightReparametrization | None = None) -> None:
        super().__init__(affine=False, weight=weight)

    def layer(self, num_features: int, layout: Layout) -> nn.Module:
        return Identity()

    def recurrent_layer(self, num_features: int, site: Site, num_steps: int) -> nn.Module:
        return Identity()


class Identity(nn.Module):
    """Takes what a norm layer takes, and returns the input."""

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        return x
