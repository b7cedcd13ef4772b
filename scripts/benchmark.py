"""Measure speed against a peer in the same process: pairs, taken in turns, and the spread of their ratios.

    python scripts/benchmark.py norms            print the table
    python scripts/benchmark.py norms --write    and put it into docs/benchmarks.md, the numbers beside it as JSON

A ratio of 1.00 is the peer's speed, 2.00 takes twice as long. Each is the median over the rounds of the two times of
one round, with the quartiles; absolute times depend on what else the machine does, ratios much less.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
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

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
WARMUP = 3  # rounds that do not count

Step = Callable[[], None]


@dataclass(frozen=True)
class Ratio:
    """One line of a table: what was measured, against what, and how the times of the rounds compare."""

    place: str
    what: str
    peer: str
    median: float
    first_quartile: float
    third_quartile: float
    rounds: int
    milliseconds: float


def measure(place: str, what: str, step: Step, peer: str, peers_step: Step, rounds: int) -> Ratio:
    """Take the two steps in turns, each first in every other round."""
    times: dict[Step, list[float]] = {step: [], peers_step: []}
    warmup = min(WARMUP, rounds)
    for round_number in range(warmup + rounds):
        for one in (step, peers_step) if round_number % 2 else (peers_step, step):
            synchronize()
            start = time.perf_counter()
            one()
            synchronize()
            if round_number >= warmup:
                times[one].append(time.perf_counter() - start)
    ratios = [ours / theirs for ours, theirs in zip(times[step], times[peers_step], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    milliseconds = 1000 * statistics.median(times[step])
    return Ratio(place, what, peer, median, first, third, rounds, milliseconds)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Norms inside networks --------------------------------------------------------------------------------------------


class Torchs:
    """Hands out torch's own modules, so that a network of ours can be built with them.

    Args:
        image, sequence: make the module for so many features.
        wrap: reparametrizes a linear layer or a convolution.
        needs_bias: whether the module before keeps its bias.
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
        return Alone(nn.Sequential(*parts, *([activation] if activation is not None else [])))

    def recurrent(self, num_features: int, site: str, *, num_steps: int) -> nn.Module:
        return Alone(self.make["sequence"](num_features))

    def zero_init(self, layer: nn.Module, module: nn.Module) -> None:
        pass


class Alone(nn.Module):
    """Calls a module of torch's with the input alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
        return self.module(x)


class StepsLast(nn.Module):
    """A module of torch's that wants its features in dimension 1."""

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
# torch's own module in the same place, where it has one
IN_RESNET = {
    "batchnorm": ("nn.BatchNorm2d", Torchs(image=nn.BatchNorm2d)),
    "layernorm": ("nn.GroupNorm(1)", Torchs(image=lambda c: nn.GroupNorm(1, c))),
    "groupnorm": ("nn.GroupNorm(8)", Torchs(image=lambda c: nn.GroupNorm(8, c))),
    "instancenorm": ("nn.InstanceNorm2d", Torchs(image=lambda c: nn.InstanceNorm2d(c, affine=True))),
    "weightnorm": ("weight_norm", Torchs(wrap=weight_normed, needs_bias=True)),
    "spectralnorm": ("spectral_norm", Torchs(wrap=spectrally_normed, needs_bias=True)),
}
IN_TRANSFORMER = {
    "batchnorm": ("nn.BatchNorm1d", Torchs(sequence=lambda c: StepsLast(nn.BatchNorm1d(c)))),
    "layernorm": ("nn.LayerNorm", Torchs(sequence=nn.LayerNorm)),
    "groupnorm": ("nn.GroupNorm(8)", Torchs(sequence=lambda c: StepsLast(nn.GroupNorm(8, c)))),
    "instancenorm": ("nn.InstanceNorm1d", Torchs(sequence=lambda c: StepsLast(nn.InstanceNorm1d(c, affine=True)))),
    "rmsnorm": ("nn.RMSNorm", Torchs(sequence=lambda c: nn.RMSNorm(c, eps=1e-5))),
    "weightnorm": ("weight_norm", Torchs(wrap=weight_normed)),
    "spectralnorm": ("spectral_norm", Torchs(wrap=spectrally_normed)),
}


def norms(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Each norm in the ResNet and the transformer, forward and backward, and the LSTM against torch's."""
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
                continue  # there are no convolutions
            if name in peers:
                peer, torchs = peers[name]
                yield measure(place, name, network(norm), peer, network(torchs), rounds)
            yield measure(place, name, network(norm), "no norm", network(NoNorm()), rounds)


def lstm(rounds: int, vectors: Tensor) -> Iterator[Ratio]:
    """Our LSTM with the norm at its three sites against torch's without one, T = 64, B = 32, H = 128."""

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
    """A forward and a backward pass, into the inputs too where they ask for it."""

    def step() -> None:
        outputs = network(inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.square().mean().backward()
        inputs.grad = None
        network.zero_grad()

    return step


# What is written --------------------------------------------------------------------------------------------------

SUITES: dict[str, Callable[[int, torch.device], Iterator[Ratio]]] = {"norms": norms}


def table(ratios: list[Ratio]) -> str:
    lines = ["| where | what | against | ratio (quartiles) | ms |", "|---|---|---|---|---|"]
    for r in ratios:
        spread = f"{r.median:.2f} ({r.first_quartile:.2f} to {r.third_quartile:.2f})"
        lines.append(f"| {r.place} | {r.what} | {r.peer} | {spread} | {r.milliseconds:.1f} |")
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def write(suite: str, ratios: list[Ratio], heading: str) -> None:
    """Put the table between the suite's marks in docs/benchmarks.md, and the numbers into a JSON file."""
    begin, end = f"<!-- {suite} -->", f"<!-- end of {suite} -->"
    before, _, rest = PAGE.read_text().partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n{heading}\n\n{table(ratios)}\n{end}{after}")
    numbers = {"heading": heading, "ratios": [asdict(ratio) for ratio in ratios]}
    (PAGE.parent / f"benchmark_{suite}.json").write_text(json.dumps(numbers, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of times, 40")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU, 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    command = f"python scripts/benchmark.py {chosen.suite} --rounds {chosen.rounds} --threads {chosen.threads}"
    heading = f"{machine(device)}; torch {torch.__version__}, Python {platform.python_version()}; `{command}`"
    print(heading)
    ratios = []
    for ratio in SUITES[chosen.suite](chosen.rounds, device):
        ratios.append(ratio)
        print(
            f"{ratio.place:14} {ratio.what:32} {ratio.peer:18} {ratio.median:.2f}  {ratio.milliseconds:.1f} ms",
            flush=True,
        )
    if chosen.write:
        write(chosen.suite, ratios, heading)


if __name__ == "__main__":
    main()
