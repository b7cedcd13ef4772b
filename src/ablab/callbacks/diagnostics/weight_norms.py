"""Weight norms, effective learning rates and angular updates."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ablab.callbacks.diagnostics.diagnostic import (
    CheckedCallback,
    check_at_least,
    layer_means,
    learned_weight,
    log_row,
    to_float64,
    weight_layers,
)
from ablab.data.datamodule import DataModule
from ablab.tasks.task import Task


class WeightNorms(CheckedCallback):
    """Weight norm, gradient norm, effective learning rate and angular update of each layer's weight w.

    Weight norm ‖w‖, gradient norm ‖∂L/∂w‖ (of the whole batch, before clipping), effective learning rate lr / ‖w‖², and
    angular update arccos(wᵀw' / ‖w‖ ‖w'‖) in radians, with w' the weight after the step. w is the layer's flattened
    weight; under weight norm the direction v, under spectral norm and weight standardization the learned parameter.

    The effective learning rate is meaningful for scale-invariant weights only, that is, before a norm that divides by a
    statistic, or for v under weight norm: under plain SGD, training is then equivalent to ‖w‖ = 1 with that learning
    rate. It is also logged for other layers, such as the last one, where it has no such meaning.

    Logs `weights/norm/<layer>`, `weights/gradient_norm/<layer>`, `weights/effective_lr/<layer>`,
    `weights/angular_update/<layer>`, and the means over layers as `weights/norm`, …. Weights of length 0 have no
    effective learning rate and no angular update; skipped steps have no gradient norm.

    Args:
        every_n_steps: steps between two measurements, starting with the first step.

    Raises:
        ValueError: `every_n_steps` is below 1, or the model has no layer with trained weights.

    References:
        van Laarhoven 2017 (effective learning rate), https://arxiv.org/abs/1706.05350
        Wan et al. 2021 (angular update), https://arxiv.org/abs/2006.08419
    """

    def __init__(self, *, every_n_steps: int = 10) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.step = 0
        self.before: dict[str, Tensor] = {}  # weights before the current step, if that is measured
        self.gradients: dict[str, float] = {}
        self.rates: dict[str, float] = {}

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Check that the model has a layer with a trained weight."""
        if not trained_weights(model):
            raise ValueError(
                f"{type(model).__name__} has no layer with a weight that is trained; leave WeightNorms out"
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            assert isinstance(pl_module, Task)
            self.step = trainer.global_step
            weights = trained_weights(pl_module.model)
            self.before = {name: w.detach().clone() for name, w in weights.items()}
            groups = trainer.optimizers[0].param_groups
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
            self.rates = {name: rates[id(w)] for name, w in weights.items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.before:
            assert isinstance(pl_module, Task)
            gradients = {name: w.grad for name, w in trained_weights(pl_module.model).items()}
            self.gradients = {name: float(to_float64(g).norm()) for name, g in gradients.items() if g is not None}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if not self.before:
            return
        assert isinstance(pl_module, Task)
        norms = {name: float(to_float64(w).norm()) for name, w in self.before.items()}
        values = {
            **layer_means("weights/norm", norms),
            **layer_means("weights/gradient_norm", self.gradients),
            **layer_means("weights/effective_lr", {n: self.rates[n] / norm**2 for n, norm in norms.items() if norm}),
            **layer_means(
                "weights/angular_update",
                {
                    name: angle(self.before[name], w.detach())
                    for name, w in trained_weights(pl_module.model).items()
                    if norms[name] and w.detach().any()
                },
            ),
        }
        log_row(trainer, values, self.step)
        self.before, self.gradients, self.rates = {}, {}, {}


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weight of each layer, by name."""
    weights = {name: learned_weight(module) for name, module in weight_layers(model).items()}
    return {name: weight for name, weight in weights.items() if weight is not None and weight.requires_grad}


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two flattened tensors in radians, accurate for small angles (Kahan's formula)."""
    u, v = (to_float64(x).flatten() / to_float64(x).norm() for x in (a, b))
    return float(2 * torch.atan2((u - v).norm(), (u + v).norm()))
