"""Weight reparametrizations: weight norm, weight standardization and spectral norm."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

CONVOLUTIONS = (nn.modules.conv._ConvNd,)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class WeightReparametrization(ABC):
    """Base class of reparametrizations, which compute a weight as a function of other parameters."""

    has_state: ClassVar[bool] = False  # whether it adds buffers
    title: ClassVar[str]  # name in messages
    kinds: ClassVar[str] = "linear layers and convolutions"  # the modules that it reparametrizes, in messages

    @abstractmethod
    def __call__(self, module: nn.Module) -> nn.Module:
        """Reparametrize `module.weight` in place and return the module."""

    def zero_(self, module: nn.Module) -> None:
        """Set the module's weight to zero so that it still receives gradients; by default, do nothing."""
        return

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})" if settings else type(self).__name__


class PlainWeight(WeightReparametrization):
    """No reparametrization."""

    title = "no reparametrization"

    def __call__(self, module: nn.Module) -> nn.Module:
        return module

    def zero_(self, module: nn.Module) -> None:
        assert isinstance(module.weight, Tensor)
        nn.init.zeros_(module.weight)


class WeightNorm(WeightReparametrization):
    """Weight normalization: learns the length g and the direction v of each output feature's weight separately.

    w = g · v / ‖v‖ with one g per output feature; g is initialized to ‖v‖, so that wrapping changes no output.

    Raises:
        ValueError: a weight has length 0, or is shared with another module.

    References:
        Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868
    """

    title = "weight norm"

    def __call__(self, module: nn.Module) -> nn.Module:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if getattr(weight, "replaced", False):
            raise ValueError(
                f"weight norm of {module}: its weight is shared with a module that was reparametrized before, and each "
                "would get parameters of its own; share none, or choose norm/weight=none"
            )
        length = torch.linalg.vector_norm(weight.detach(), dim=other_dims(weight, output_dim(module)))
        if not weight.is_meta and (length == 0).any():
            raise ValueError(
                f"weight norm of {module}: a weight of length 0 has no direction; initialize it with other "
                "values, and make the layer zero by Norm.zero_init, which zeroes g"
            )
        parametrize.register_parametrization(module, "weight", LengthAndDirection(module, weight))
        weight.replaced = True  # type: ignore[attr-defined]
        return module

    def zero_(self, module: nn.Module) -> None:
        # g is original0, v is original1
        nn.init.zeros_(module.parametrizations.weight.original0)  # type: ignore[union-attr, arg-type]


class LengthAndDirection(nn.Module):
    """w = g · v / ‖v‖; keeps a weak reference to the original parameter, to detect that another module shares it."""

    def __init__(self, module: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.dim = output_dim(module)
        self.replaced: Any = weakref.ref(weight)

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        return torch._weight_norm(direction, length, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(weight, dim=other_dims(weight, self.dim), keepdim=True), weight.clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "replaced": None}  # weak references cannot be pickled or copied


class WeightStandardization(WeightReparametrization):
    """Weight standardization: zero mean and unit variance of each output feature's weight, for convolutions only.

    w = (v − mean) / sqrt(var + eps), with mean and biased variance over all weights of an output feature. Use it with
    an activation norm, which cancels the scale.

    Args:
        eps: added to the variance inside the root, as in the paper's formula (the authors' code adds it to the unbiased
            standard deviation).

    References:
        Qiao et al. 2019, https://arxiv.org/abs/1903.10520
    """

    title = "weight standardization"
    kinds = "convolutions"

    def __init__(self, *, eps: float = 1e-5) -> None:
        if eps <= 0:
            raise ValueError(f"eps={eps}: the variance needs something added before the root, for example 1e-5")
        self.eps = eps

    def __call__(self, module: nn.Module) -> nn.Module:
        if isinstance(module, CONVOLUTIONS):
            parametrize.register_parametrization(module, "weight", StandardizedWeight(output_dim(module), self.eps))
        return module


class StandardizedWeight(nn.Module):
    """(v − mean) / sqrt(var + eps), for each output feature."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        v = at_least_float32(weight)
        var, mean = torch.var_mean(v, other_dims(v, self.dim), correction=0, keepdim=True)
        return ((v - mean) * torch.rsqrt(var + self.eps)).to(weight.dtype)


class SpectralNorm(WeightReparametrization):
    """Spectral normalization: divides the weight by its largest singular value.

    w = v / σ(v), where a convolution's weight is the matrix (out, in · kernel). σ is estimated by power iteration,
    which each training step continues.

    Args:
        num_iterations: power iterations per training step.
        eps: added to the vectors' lengths before dividing by them.

    References:
        Miyato et al. 2018, https://arxiv.org/abs/1802.05957
    """

    title = "spectral norm"
    has_state = True

    def __init__(self, *, num_iterations: int = 1, eps: float = 1e-12) -> None:
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations}: at least one is needed")
        self.num_iterations = num_iterations
        self.eps = eps

    def __call__(self, module: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # its random vectors must not shift later draws
            return parametrizations.spectral_norm(
                module, "weight", self.num_iterations, eps=self.eps, dim=output_dim(module)
            )


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32, which statistics need; leave other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def output_dim(module: nn.Module) -> int:
    """Return the dimension of a module's weight that indexes its output features."""
    if isinstance(module, TRANSPOSED) and module.groups > 1:
        raise ValueError(
            f"{module}: the weight of a grouped transposed convolution has no dimension for its outputs; use groups=1, "
            "or leave it unwrapped"
        )
    return 1 if isinstance(module, TRANSPOSED) else 0


def other_dims(weight: Tensor, dim: int) -> tuple[int, ...]:
    """Return all dimensions of a weight except one."""
    return tuple(d for d in range(weight.dim()) if d != dim)
