"""How long weights are, and how far a step turns them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ablab.callbacks.measures.measure import Checked, at_least, by_layer, direction, exact, layers, log
from ablab.data.datamodule import DataModule
from ablab.tasks.task import Task


class WeightNorms(Checked):
    """Length of each layer's weight w, of its gradient, its effective learning rate, and its angular update in a step.

    Norm ‖w‖, gradient norm ‖∂L/∂w‖ (before clipping, of the whole batch), effective learning rate lr / ‖w‖², angular
    update arccos(wᵀw' / ‖w‖ ‖w'‖) in radians, with w' after the step. w is all of a layer's weight as one vector; under
    weight norm it is the direction v, under spectral norm and weight standardization what is learned.

    The effective learning rate means something for a weight whose scale does not matter, as before a norm that divides
    by a statistic, or v under weight norm: only there is the function the same at ‖w‖ = 1 with that rate (under plain
    SGD). The last layer, and every layer without a norm behind it, has a number and no such meaning.

    Logs `weights/norm/<layer>`, `weights/gradient_norm/<layer>`, `weights/effective_lr/<layer>`,
    `weights/angular_update/<layer>`, and the means over layers as `weights/norm`, …. A weight of length 0 has neither
    of the last two; in a step that is left out no gradient is logged.

    Args:
        every_n_steps: steps between two measurements; the first is at the first step.

    Raises:
        ValueError: `every_n_steps` below 1, or a model without layers.

    References:
        van Laarhoven 2017 (effective learning rate), https://arxiv.org/abs/1706.05350
        Wan et al. 2021 (angular update), https://arxiv.org/abs/2006.08419
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.step = 0
        self.before: dict[str, Tensor] = {}  # weights, during a step that is measured
        self.gradients: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Refuse what cannot be measured, before anything is trained."""
        if not trained(model):
            raise ValueError(
                f"{type(model).__name__} has no layer with a weight that is trained; leave WeightNorms out"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            assert isinstance(pl_module, Task)
            self.step = trainer.global_step
            weights = trained(pl_module.model)
            self.before = {name: w.detach().clone() for name, w in weights.items()}
            groups = trainer.optimizers[0].param_groups
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
            self.rates = {name: rates[id(w)] for name, w in weights.items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.before:
            assert isinstance(pl_module, Task)
            gradients = {name: w.grad for name, w in trained(pl_module.model).items()}
            self.gradients = {name: float(exact(g).norm()) for name, g in gradients.items() if g is not None}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if not self.before:
            return
        assert isinstance(pl_module, Task)
        norms = {name: float(exact(w).norm()) for name, w in self.before.items()}
        values = {
            **by_layer("weights/norm", norms),
            **by_layer("weights/gradient_norm", self.gradients),
            **by_layer("weights/effective_lr", {n: self.rates[n] / norm**2 for n, norm in norms.items() if norm}),
            **by_layer(
                "weights/angular_update",
                {
                    name: angle(self.before[name], w.detach())
                    for name, w in trained(pl_module.model).items()
                    if norms[name] and w.detach().any()
                },
            ),
        }
        log(trainer, values, self.step)
        self.before, self.gradients, self.rates = {}, {}, {}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each layer that is trained."""
    weights = {name: direction(module) for name, module in layers(model).items()}
    return {name: weight for name, weight in weights.items() if weight is not None and weight.requires_grad}


def angle(a: Tensor, b: Tensor) -> float:
    """The angle between two tensors as vectors, in radians; exact for small ones too (Kahan)."""
    u, v = (exact(x).flatten() / exact(x).norm() for x in (a, b))
    return float(2 * torch.atan2((u - v).norm(), (u + v).norm()))
