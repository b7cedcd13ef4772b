"""Reparametrizations of weights: what a norm may do to weights instead of, or beside, the activations."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn.utils import parametrizations

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WeightReparametrization(ABC):
    """Replaces the weight of a linear or convolution by a function of other parameters."""

    @abstractmethod
    def __call__(self, module: nn.Module) -> nn.Module:
        """Reparametrize `module.weight` in place and return the module."""

    def __repr__(self) -> str:
        return type(self).__name__

    @abstractmethod
    def zero_(self, module: nn.Module) -> None:
        """Make the module's weight zero in a way that it can still learn from."""


class PlainWeight(WeightReparametrization):
    """Leaves weights as they are."""

    def __call__(self, module: nn.Module) -> nn.Module:
        return module

    def zero_(self, module: nn.Module) -> None:
        assert isinstance(module.weight, Tensor)
        nn.init.zeros_(module.weight)


class WeightNorm(WeightReparametrization):
    """Weight normalization: the length g and the direction v of each output's weight are learned apart.

    w = g · v / ‖v‖, one g for each output feature; g starts as ‖v‖, so that wrapping changes no output.

    References:
        Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868
    """

    def __call__(self, module: nn.Module) -> nn.Module:
        assert isinstance(module.weight, Tensor)
        output_dim = 1 if isinstance(module, TRANSPOSED) else 0
        others = tuple(dim for dim in range(module.weight.dim()) if dim != output_dim)
        if not module.weight.is_meta and (module.weight.detach().pow(2).sum(others) == 0).any():
            raise ValueError(
                f"weight norm of {module}: a weight of length 0 has no direction; initialize it with other "
                "values, and make the layer zero by Norm.zero_init, which zeroes g"
            )
        return parametrizations.weight_norm(module, "weight", dim=output_dim)

    def zero_(self, module: nn.Module) -> None:
        # torch keeps g as original0 and v as original1
        nn.init.zeros_(module.parametrizations.weight.original0)  # type: ignore[union-attr, arg-type]
