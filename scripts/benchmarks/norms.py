"""The cost of a full forward and backward pass of networks, with each norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ablab.models.resnet import ResNet
from ablab.models.rnn import LSTMCell
from ablab.models.transformer import Transformer
from ablab.norms import (
    BatchNorm,
    DyT,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    NoNorm,
    Norm,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
    WeightStandardization,
)
from benchmarks.measuring import Ratio, Step, measure


class TorchNorm:
    """Builds torch's own modules as norms, for use in this project's networks.

    Args:
        image, sequence: build the module for a number of features.
        wrap: reparametrizes a linear layer or a convolution.
        needs_bias: the preceding module keeps its bias.
    """

    def __init__(
        self,
        *,
        image: Callable[[int], nn.Module] = lambda num_features: nn.Identity(),
        sequence: Callable[[int], nn.Module] = lambda num_features: nn.Identity(),
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        needs_bias: bool = False,
    ) -> None:
        self.make = {"image": image, "sequence": sequence}
        self.wrap = wrap
        self.needs_bias = needs_bias

    def __call__(
        self, num_features: int, layout: str, *, causal: bool = False, activation: nn.Module | None = None
    ) -> nn.Module:
        module = self.make[layout](num_features)
        parts = [] if isinstance(module, nn.Identity) else [module]
        return InputOnly(nn.Sequential(*parts, *([activation] if activation is not None else [])))

    def recurrent(self, num_features: int, site: str, *, num_steps: int) -> nn.Module:
        return InputOnly(self.make["sequence"](num_features))

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None:
        pass


class InputOnly(nn.Module):
    """Calls a torch module with the input alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        return self.module(x)


class FeaturesFirst(nn.Module):
    """A torch module that expects features in dimension 1."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.transpose(1, 2)).transpose(1, 2)


def weight_normed(module: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(module)


def spectrally_normed(module: nn.Module) -> nn.Module:
    return parametrizations.spectral_norm(module)


NORMS: dict[str, Norm] = {
    "batchnorm": BatchNorm(),
    "layernorm": LayerNorm(),
    "groupnorm": GroupNorm(num_groups=8),
    "instancenorm": InstanceNorm(),
    "rmsnorm": RMSNorm(),
    "weightnorm": NoNorm(weight=WeightNorm()),
    "spectralnorm": NoNorm(weight=SpectralNorm()),
    "groupnorm_weightstandardization": GroupNorm(num_groups=8, weight=WeightStandardization()),
    "ghostbatchnorm": BatchNorm(ghost_batch_size=16),
    "batchrenorm": BatchNorm(r_max=3, d_max=5),
    "meanonlybatchnorm": BatchNorm(mean_only=True),
    "frn": FilterResponseNorm(),
    "evonorm_s0": EvoNormS0(num_groups=8),
    "evonorm_b0": EvoNormB0(),
    "dyt": DyT(),
}
# torch's own module in the same place, if it has one
IN_RESNET = {
    "batchnorm": ("nn.BatchNorm2d", TorchNorm(image=nn.BatchNorm2d)),
    "layernorm": ("nn.GroupNorm(1)", TorchNorm(image=lambda c: nn.GroupNorm(1, c))),
    "groupnorm": ("nn.GroupNorm(8)", TorchNorm(image=lambda c: nn.GroupNorm(8, c))),
    "instancenorm": ("nn.InstanceNorm2d", TorchNorm(image=lambda c: nn.InstanceNorm2d(c, affine=True))),
    "weightnorm": ("weight_norm", TorchNorm(wrap=weight_normed, needs_bias=True)),
    "spectralnorm": ("spectral_norm", TorchNorm(wrap=spectrally_normed, needs_bias=True)),
}
IN_TRANSFORMER = {
    "batchnorm": ("nn.BatchNorm1d", TorchNorm(sequence=lambda c: FeaturesFirst(nn.BatchNorm1d(c)))),
    "layernorm": ("nn.LayerNorm", TorchNorm(sequence=nn.LayerNorm)),
    "groupnorm": ("nn.GroupNorm(8)", TorchNorm(sequence=lambda c: FeaturesFirst(nn.GroupNorm(8, c)))),
    "instancenorm": (
        "nn.InstanceNorm1d",
        TorchNorm(sequence=lambda c: FeaturesFirst(nn.InstanceNorm1d(c, affine=True))),
    ),
    "rmsnorm": ("nn.RMSNorm", TorchNorm(sequence=lambda c: nn.RMSNorm(c, eps=1e-5))),
    "weightnorm": ("weight_norm", TorchNorm(wrap=weight_normed)),
    "spectralnorm": ("spectral_norm", TorchNorm(wrap=spectrally_normed)),
}


def norms(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure each norm in the ResNet and the transformer, forward and backward, and the LSTM against torch's."""
    yield from lstm(rounds, torch.randn(32, 64, 128, device=device))
    images = torch.randn(32, 3, 32, 32, device=device)
    vectors = torch.randn(32, 64, 128, device=device)

    def resnet(norm: Any) -> Step:
        return training(ResNet(3, 10, norm=norm, depth=20, width=16).to(device), images)

    def transformer(norm: Any) -> Step:
        sizes = {"in_features": 128, "num_classes": 10, "context_length": 64, "embed_dim": 128, "num_layers": 2}
        return training(Transformer(norm=norm, **sizes).to(device), vectors)

    networks = (("ResNet-20", resnet, IN_RESNET), ("transformer", transformer, IN_TRANSFORMER))
    for place, network, peers in networks:
        for name, norm in NORMS.items():
            if place == "transformer" and "weightstandardization" in name:
                continue  # the transformer has no convolutions
            if name in peers:
                peer, torchs = peers[name]
                yield measure(place, name, network(norm), peer, network(torchs), rounds)
            yield measure(place, name, network(norm), "no norm", network(NoNorm()), rounds)


def lstm(rounds: int, vectors: Tensor) -> Iterator[Ratio]:
    """Measure the LSTM with the norm at its three sites against torch's without one, T = 64, B = 32, H = 128."""

    def ours(norm: Any, inputs: Tensor) -> Step:
        return training(LSTMCell(128, 128, norm=norm, num_steps=64).to(vectors.device), inputs)

    for place, inputs in (("LSTM", vectors), ("LSTM, deeper", vectors.clone().requires_grad_())):
        torchs = training(nn.LSTM(128, 128, batch_first=True).to(vectors.device), inputs)
        for name in ("layernorm", "none", "rmsnorm", "groupnorm", "batchnorm", "dyt", "weightnorm"):
            yield measure(place, name, ours(NORMS.get(name, NoNorm()), inputs), "nn.LSTM", torchs, rounds)
    for name in ("layernorm", "rmsnorm"):
        peer, modules = IN_TRANSFORMER[name]
        yield measure("LSTM", name, ours(NORMS[name], vectors), peer, ours(modules, vectors), rounds)


def training(network: nn.Module, inputs: Tensor) -> Step:
    """Return a forward and backward pass, including gradients of the inputs if they require them."""

    def step() -> None:
        outputs = network(inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.square().mean().backward()
        inputs.grad = None
        network.zero_grad()

    return step
