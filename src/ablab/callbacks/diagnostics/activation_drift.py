"""Drift of layer input distributions during training: internal covariate shift as originally defined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.callbacks.diagnostics.diagnostic import (
    SAMPLE_SEED,
    Diagnostic,
    TaskCopy,
    add_input_hooks,
    check_at_least,
    layer_means,
    to_float64,
    weight_layers,
)
from ablab.data.batch import Batch
from ablab.data.rng import make_generator

MIN_STD_RATIO = 1e-3  # features whose std is below this fraction of the layer's mean std are left out


class ActivationDrift(Diagnostic):
    """Change of the distribution of each layer's inputs between two measurements on the same samples.

    For each feature of the input of a convolution or linear layer, with mean μ and standard deviation σ over samples
    and positions (without padding), and sorted values x_(i): mean |μ' − μ| / σ, standard deviation |σ' − σ| / σ, and
    distance (1/n) Σ_i |x'_(i) − x_(i)| / σ, the first Wasserstein distance between the two samples. Each is averaged
    over the layer's features, except those whose σ was below 0.001 of the layer's mean σ, such as dead ReLUs.

    Measures the inputs of layers with weights, which exist with every norm and without, not those of norms. Layers that
    read the data directly cannot drift and are left out. The state projection of a recurrent cell is not called as a
    module and is not measured, but the layer above sees its effect. Norms are in training mode; dropout is off.

    Logs `drift/mean/<layer>`, `drift/std/<layer>`, `drift/distance/<layer>`, and their means over layers, `drift/mean`,
    `drift/std`, `drift/distance`, from the second measurement on. Values are changes per `every_n_steps` steps.

    Args:
        num_values: number of values per feature, sampled once, for the distance; mean and standard deviation use all
            values.
        every_n_steps, num_samples: see `Diagnostic`.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    measures_final_weights = False  # a drift over fewer steps would not be comparable

    def __init__(self, *, every_n_steps: int = 50, num_samples: int = 256, num_values: int = 512) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)
        check_at_least(2, num_values=num_values)
        self.num_values = num_values
        self.earlier: dict[str, dict[str, Tensor]] = {}

    def measure(self, task_copy: TaskCopy, batches: list[Batch], lr: float) -> Mapping[str, float]:
        now = distributions(task_copy, batches, self.num_values)
        earlier, self.earlier = self.earlier, now
        if not earlier:
            return {}
        moved = {name: drift(earlier[name], now[name]) for name in now}
        return {
            column: value
            for i, title in enumerate(("drift/mean", "drift/std", "drift/distance"))
            for column, value in layer_means(title, {name: m[i] for name, m in moved.items() if m is not None}).items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "earlier": self.earlier}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.earlier = state_dict["earlier"]


def drift(earlier: dict[str, Tensor], now: dict[str, Tensor]) -> tuple[float, float, float] | None:
    """Return the changes of mean and std and the distance, averaged over features; None if all were constant."""
    std = earlier["std"]
    varies = std > MIN_STD_RATIO * std.mean()
    if not varies.any():
        return None
    mean = (now["mean"] - earlier["mean"]).abs()
    spread = (now["std"] - std).abs()
    distance = (now["values"] - earlier["values"]).abs().mean(0)
    a, b, c = (float((change[varies] / std[varies]).mean()) for change in (mean, spread, distance))
    return a, b, c


@torch.no_grad()
def distributions(task_copy: TaskCopy, batches: list[Batch], num_values: int) -> dict[str, dict[str, Tensor]]:
    """Return mean, standard deviation and sorted sample values of each feature of each layer's inputs, on the CPU.

    Shape:
        mean `(C)`, std `(C)`, values `(at most num_values, C)`
    """
    modules = {name: m for name, m in weight_layers(task_copy.model).items() if not isinstance(m, nn.Embedding)}
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    kept: dict[str, list[Tensor]] = {}
    data_layers: set[str] = set()  # layers that read the data directly
    valid: Tensor | None = None
    share = -(-num_values // len(batches))

    def look(name: str, module: nn.Module, arguments: Any, keywords: Any) -> None:
        x = arguments[0]
        if not x.requires_grad:
            data_layers.add(name)
            return
        rows = feature_rows(x.detach(), module, valid)
        chosen = torch.randperm(len(rows), generator=make_generator(SAMPLE_SEED, len(rows)))[:share].to(rows.device)
        kept.setdefault(name, []).append(rows[chosen].cpu())
        values = to_float64(rows)
        zeros = values.new_zeros(values.shape[1])
        # combines the moments of batches (Chan, Golub & LeVeque 1979)
        count, mean, squares = sums.get(name, (0, zeros, zeros))
        delta = values.mean(0) - mean
        total = count + len(rows)
        squares = squares + (values - values.mean(0)).square().sum(0) + delta.square() * count * len(rows) / total
        sums[name] = (total, mean + delta * len(rows) / total, squares)

    handles = add_input_hooks(modules, look)
    try:
        for batch in batches:
            valid = batch.valid
            with torch.enable_grad():  # requires_grad shows which inputs depend on weights
                task_copy(batch)
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
        if name not in data_layers
    }


def feature_rows(x: Tensor, module: nn.Module, valid: Tensor | None) -> Tensor:
    """Reshape a module's input to `(values, features)`, without padding; prepended positions (class token) are kept."""
    if isinstance(module, nn.modules.conv._ConvNd):
        x = x.movedim(1, -1)
    if valid is not None and x.dim() == 3 and x.shape[1] >= valid.shape[1]:
        return x[F.pad(valid, (x.shape[1] - valid.shape[1], 0), value=True)]
    return x.reshape(-1, x.shape[-1])
