"""Internal covariate shift: change of a layer's gradient caused by the update of the layers below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ablab.callbacks.diagnostics.diagnostic import (
    CheckedCallback,
    TaskCopy,
    add_input_hooks,
    check_at_least,
    layer_means,
    log_row,
    to_float64,
    weight_layers,
)
from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.tasks.task import Task


class CovariateShift(CheckedCallback):
    """Internal covariate shift as the change of gradients over a step: ‖G − G'‖ and cos(G, G') of each layer.

    G = ∇_{W_i} L(W_1, …, W_k) is the gradient of layer i's weight and bias before step t, and
    G' = ∇_{W_i} L(W'_1, …, W'_{i−1}, W_i, …, W_k) is the same gradient after the optimizer's update of the layers
    below. L is the loss on the batch of the step, with the same dropout masks.

    Layers are in the order of the forward pass; other parameters between two layers (a norm's gain, a token) are
    updated with the lower one. Of parallel branches, the one computed first counts as below; in a recurrent cell, the
    input projection is below the state projection. The lowest layer is left out, and layers with G or G' equal to zero
    have no cosine. With several processes, only the batch of rank 0 is used.

    A measurement costs one forward pass per layer, and a backward pass down to that layer.

    Logs `covariate_shift/cosine/<layer>`, `covariate_shift/distance/<layer>`, and `covariate_shift/cosine`,
    `covariate_shift/distance`, their means over layers.

    Args:
        every_n_steps: steps between two measurements, starting with the first step.

    Raises:
        ValueError: `every_n_steps` is below 1, or the model has a single layer.

    References:
        Santurkar et al. 2018, definition 2.1, https://arxiv.org/abs/1805.11604
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        check_at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.step = 0
        self.task_copy: TaskCopy | None = None  # a copy of the task before the current step, if that is measured
        self.batch: list[Batch] = []

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Check that the model has at least two layers."""
        if len(weight_layers(model)) < 2:
            raise ValueError(
                f"{type(model).__name__} has a single layer with weights, and none below it; leave CovariateShift out"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *arguments: Any
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            assert isinstance(pl_module, Task)
            self.step = trainer.global_step
            self.task_copy = TaskCopy(pl_module, seeds=(pl_module.seed, self.step, pl_module.global_rank), dropout=True)
            self.batch = batch.parts(pl_module.micro_batch_size)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if self.task_copy is None:
            return
        assert isinstance(pl_module, Task)
        after = {name: p.detach() for name, p in pl_module.model.named_parameters()}
        with isolate_rng(), torch.enable_grad():
            values = gradient_shift(self.task_copy, self.batch, after)
        log_row(trainer, values, self.step)
        self.task_copy, self.batch = None, []


def gradient_shift(task_copy: TaskCopy, batches: list[Batch], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the values to log, from the task before a step and the weights after it; modifies the copy's weights."""
    stages = group_by_layer(task_copy.model, lambda: task_copy(batches[0]))
    _, before = task_copy.gradient(batches)
    pieces = before.split([p.numel() for p in task_copy.parameters])
    own = {id(p): piece for p, piece in zip(task_copy.parameters, pieces, strict=True)}
    names = {id(p): name for name, p in task_copy.model.named_parameters()}
    cosine, distance = {}, {}
    for i, (layer, weights, _) in enumerate(stages):
        if i == 0:
            continue
        for parameter in stages[i - 1][2]:
            parameter.data.copy_(after[names[id(parameter)]])
        if not weights:
            continue
        _, moved = task_copy.gradient(batches, weights)
        g, h = to_float64(torch.cat([own[id(p)] for p in weights])), to_float64(moved)
        distance[layer] = float((g - h).norm())
        if (length := float(g.norm() * h.norm())) > 0:
            cosine[layer] = float(torch.dot(g, h)) / length
    return {**layer_means("covariate_shift/cosine", cosine), **layer_means("covariate_shift/distance", distance)}


Stage = tuple[str, list[nn.Parameter], list[nn.Parameter]]


def group_by_layer(model: nn.Module, forward: Callable[[], Any]) -> list[Stage]:
    """Return (layer name, its trained weights, all parameters updated with it), in the order of the forward pass."""
    known = weight_layers(model)
    stages: list[Stage] = []
    waiting: list[nn.Parameter] = []  # parameters before the first layer are updated with it
    for name, parameters in modules_in_call_order(model, forward):
        if name in known:
            stages.append((name, [p for p in parameters if p.requires_grad], [*waiting, *parameters]))
            waiting = []
        elif stages:
            stages[-1][2].extend(parameters)
        else:
            waiting += parameters
    return stages


def modules_in_call_order(model: nn.Module, forward: Callable[[], Any]) -> list[tuple[str, list[nn.Parameter]]]:
    """Return the modules with direct parameters, and these parameters, in the order of the forward pass.

    A module that is never called, because only its weight is used, follows the module registered before it.
    """
    owners: dict[str, nn.Module] = {}
    parameters: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue  # handled below, with the module whose weight it computes
        own = list(module.parameters(recurse=False))
        if parametrize.is_parametrized(module):
            own += list(module.parametrizations.parameters())
        if own:
            owners[name], parameters[name] = module, own
    order: list[str] = []
    handles = add_input_hooks(owners, lambda name, *_: None if name in order else order.append(name))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    before = None
    for name in owners:
        if name not in order:
            order.insert(0 if before is None else order.index(before) + 1, name)
        before = name
    return [(name, parameters[name]) for name in order]
