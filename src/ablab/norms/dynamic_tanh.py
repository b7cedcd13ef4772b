"""Dynamic tanh, which replaces a norm without computing any statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablab.norms.layer import Layout, NormLayer, Statistic
from ablab.norms.norm import Norm
from ablab.norms.weight import WeightReparametrization


class DyT(Norm):
    """Dynamic tanh: an elementwise function in place of a norm.

    y = tanh(alpha · x) · gamma + beta, with one learned alpha per layer.

    Args:
        alpha: initial value of alpha.
        affine, weight: see `Norm`.

    References:
        Zhu et al. 2025, https://arxiv.org/abs/2503.10622
    """

    def __init__(
        self, *, alpha: float = 0.5, affine: bool = True, weight: WeightReparametrization | None = None
    ) -> None:
        super().__init__(affine=affine, weight=weight)
        if alpha <= 0:
            raise ValueError(f"alpha={alpha}: more than 0 is needed, for example 0.5")
        self.alpha = alpha

    def statistics(self, layout: Layout) -> tuple[Statistic, ...]:
        return ()

    def layer(
        self,
        num_features: int,
        layout: Layout,
        *,
        num_steps: int | None = None,
        activation: nn.Module | None = None,
    ) -> NormLayer:
        return DyTLayer(self, num_features, layout, activation=activation)


class DyTLayer(NormLayer):
    """tanh(alpha · x) · gamma + beta."""

    def __init__(self, norm: DyT, num_features: int, layout: Layout, *, activation: nn.Module | None = None) -> None:
        super().__init__(norm, num_features, layout, activation=activation)
        self.alpha = nn.Parameter(torch.tensor(float(norm.alpha)))

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        return self.scale_and_shift(torch.tanh(self.alpha * x))
