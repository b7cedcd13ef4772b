"""Filter response normalization and its thresholded linear unit (TLU)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ablab.norms.layer import Layout, mean_square
from ablab.norms.sample import InstanceNorm, SampleNorm, SampleNormLayer
from ablab.norms.weight import WeightReparametrization, at_least_float32


class FilterResponseNormLayer(SampleNormLayer):
    """y = x / sqrt(mean(x²) + eps) · gamma + beta, then max(y, tau) if the model puts a nonlinearity after the norm."""

    def __init__(
        self, norm: SampleNorm, num_features: int, layout: Layout, *, activation: nn.Module | None = None
    ) -> None:
        super().__init__(norm, num_features, layout)
        self.tau = None if activation is None else nn.Parameter(torch.zeros(num_features))

    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        x = at_least_float32(x)
        dims = tuple(range(2, x.dim())) if self.layout == "image" else (1,)
        square = mean_square(x, dims, None if valid is None else valid[..., None])
        y = self.scale_and_shift(x * torch.rsqrt(square + self.eps))
        return y if self.tau is None else torch.maximum(y, self.broadcast(self.tau, y))


class FilterResponseNorm(InstanceNorm):
    """Filter response normalization: unit mean square over the positions of each feature of each sample.

    y = max(x / sqrt(mean(x²) + eps) · gamma + beta, tau). The threshold tau is learned per feature and replaces the
    nonlinearity after the norm; where the model has none, there is no threshold.

    Args:
        affine, weight: see `Norm`.
        eps: added inside the root; the paper's constant, not learned.

    References:
        Singh & Krishnan 2019, https://arxiv.org/abs/1911.09737
    """

    statistic_name = "mean square"
    layer_class = FilterResponseNormLayer

    def __init__(
        self, *, affine: bool = True, eps: float = 1e-6, weight: WeightReparametrization | None = None
    ) -> None:
        super().__init__(affine=affine, eps=eps, weight=weight)
