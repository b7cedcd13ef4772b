"""How far the inputs of a network's layers move while it learns: internal covariate shift as it was first defined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.callbacks.measures.measure import PROBE, Measure, Trial, at_least, by_layer, exact, layers, watched
from ablab.data.batch import Batch
from ablab.data.draws import generator

CONSTANT = 1e-3  # of a layer's mean standard deviation: a feature that varies less says nothing


class ActivationDrift(Measure):
    """The change of the distribution of each layer's inputs from one measurement to the next, on the same samples.

    For each feature of the input of a convolution or linear map, with mean μ and standard deviation σ over samples and
    positions (padding left out), and the sorted values x_(i):
    mean |μ' − μ| / σ, standard deviation |σ' − σ| / σ, distance (1/n) Σ_i |x'_(i) − x_(i)| / σ, the first Wasserstein
    distance of the two samples. Each is averaged over the layer's features; those whose σ was below a thousandth of
    the layer's mean σ are left out, a dead ReLU has none.

    The inputs of layers with weights and not of norms: those exist under every norm and under none. A layer that sees
    the data themselves does not drift and is left out; of a recurrent cell the state's projection is no module that is
    called, and what becomes of the state is seen by the layer above. Norms work as in training, without dropout.

    Logs `drift/mean/<layer>`, `drift/std/<layer>`, `drift/distance/<layer>`, and their means over layers, `drift/mean`,
    `drift/std`, `drift/distance`; from the second measurement on. The numbers are per `every_n_steps` steps.

    Args:
        num_values: values of a feature, drawn once, that the distance is taken of; mean and standard deviation are
            taken of all.
        every_n_steps, num_samples: see `Measure`.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    measures_last = False  # its numbers are those of a number of steps

    def __init__(self, *, every_n_steps: int = 50, num_samples: int = 256, num_values: int = 512) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)
        at_least(2, num_values=num_values)
        self.num_values = num_values
        self.earlier: dict[str, dict[str, Tensor]] = {}

    def measure(self, trial: Trial, batches: list[Batch], lr: float) -> Mapping[str, float]:
        now = distributions(trial, batches, self.num_values)
        earlier, self.earlier = self.earlier, now
        if not earlier:
            return {}
        moved = {name: drift(earlier[name], now[name]) for name in now}
        return {
            column: value
            for i, title in enumerate(("drift/mean", "drift/std", "drift/distance"))
            for column, value in by_layer(title, {name: m[i] for name, m in moved.items() if m is not None}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "earlier": self.earlier}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.earlier = state_dict["earlier"]


def drift(earlier: dict[str, Tensor], now: dict[str, Tensor]) -> tuple[float, float, float] | None:
    """Change of mean and of standard deviation and distance, averaged over features; None if all were constant."""
    std = earlier["std"]
    varies = std > CONSTANT * std.mean()
    if not varies.any():
        return None
    mean = (now["mean"] - earlier["mean"]).abs()
    spread = (now["std"] - std).abs()
    distance = (now["values"] - earlier["values"]).abs().mean(0)
    a, b, c = (float((change[varies] / std[varies]).mean()) for change in (mean, spread, distance))
    return a, b, c


@torch.no_grad()
def distributions(trial: Trial, batches: list[Batch], num_values: int) -> dict[str, dict[str, Tensor]]:
    """Mean, standard deviation and some sorted values of each feature of each layer's inputs, on the CPU.

    Shape:
        mean `(C)`, std `(C)`, values `(at most num_values, C)`
    """
    modules = {name: m for name, m in layers(trial.model).items() if not isinstance(m, nn.Embedding)}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    kept: dict[str, list[Tensor]] = {}
    of_data: set[str] = set()
    valid: Tensor | None = None
    share = -(-num_values // len(batches))

    def look(name: str, module: nn.Module, arguments: Any, keywords: Any) -> None:
        x = arguments[0]
        if not x.requires_grad:
            of_data.add(name)
            return
        rows = by_feature(x.detach(), module, valid)
        chosen = torch.randperm(len(rows), generator=generator(PROBE, len(rows)))[:share].to(rows.device)
        kept.setdefault(name, []).append(rows[chosen].cpu())
        values = exact(rows)
        nothing = values.new_zeros(values.shape[1])
        count, mean, squares = sums.get(name, (0, nothing, nothing))
        away = values.mean(0) - mean
        total = count + len(rows)
        squares = squares + (values - values.mean(0)).square().sum(0) + away.square() * count * len(rows) / total
        sums[name] = (total, mean + away * len(rows) / total, squares)

    handles = watched(modules, look)
    try:
        for batch in batches:
            valid = batch.valid
            with torch.enable_grad():  # shows which inputs depend on a weight
                trial(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {
            "mean": mean.cpu(),
            "std": (squares / count).sqrt().cpu(),
            "values": torch.cat(kept[name]).sort(0).values,
        }
        for name, (count, mean, squares) in sums.items()
        if name not in of_data
    }


def by_feature(x: Tensor, module: nn.Module, valid: Tensor | None) -> Tensor:
    """A module's input as `(values, features)`, without padding; positions put before a sequence are real."""
    if isinstance(module, nn.modules.conv._ConvNd):
        x = x.movedim(1, -1)
    if valid is not None and x.dim() == 3 and x.shape[1] >= valid.shape[1]:
        return x[F.pad(valid, (x.shape[1] - valid.shape[1], 0), value=True)]
    return x.reshape(-1, x.shape[-1])
