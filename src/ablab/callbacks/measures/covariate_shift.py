"""How much a layer's gradient changes when the layers below it take their step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ablab.callbacks.measures.measure import Checked, Trial, at_least, by_layer, exact, layers, log, watched
from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.tasks.task import Task


class CovariateShift(Checked):
    """Internal covariate shift as the change of gradients: ‖G − G'‖ and cos(G, G') of each layer, over a step.

    G = ∇_{W_i} L(W_1, …, W_k), the gradient by layer i's weight and bias before step t, and
    G' = ∇_{W_i} L(W'_1, …, W'_{i−1}, W_i, …, W_k), the same after the layers below have taken the step that the
    optimizer took; L is the loss of the step's own batch, with the step's own dropout.

    Layers are in the order of the forward pass; what lies between two of them (a norm's gain, a token) steps with the
    lower one. Beside a shortcut, the branch that is computed first is below; in a recurrent cell the input's projection
    is below the state's. The lowest layer has none below it and is left out, and so is one whose G or G' is zero from
    its cosine. Under several processes it is the first one's share of the batch.

    A measurement costs a forward pass for each layer, and a backward pass down to it.

    Logs `covariate_shift/cosine/<layer>`, `covariate_shift/distance/<layer>`, and `covariate_shift/cosine`,
    `covariate_shift/distance`, their means over layers.

    Args:
        every_n_steps: steps between two measurements; the first is at the first step.

    Raises:
        ValueError: `every_n_steps` below 1, or a model with a single layer.

    References:
        Santurkar et al. 2018, definition 2.1, https://arxiv.org/abs/1805.11604
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        at_least(1, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self.step = 0
        self.trial: Trial | None = None  # the task as it was before the step, during one that is measured
        self.batch: list[Batch] = []

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Refuse what cannot be measured, before anything is trained."""
        if len(layers(model)) < 2:
            raise ValueError(
                f"{type(model).__name__} has a single layer with weights, and none below it; leave CovariateShift out"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *arguments: Any
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            assert isinstance(pl_module, Task)
            self.step = trainer.global_step
            self.trial = Trial(pl_module, seeds=(pl_module.seed, self.step, pl_module.global_rank), dropout=True)
            self.batch = batch.parts(pl_module.micro_batch_size)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if self.trial is None:
            return
        assert isinstance(pl_module, Task)
        after = {name: p.detach() for name, p in pl_module.model.named_parameters()}
        with isolate_rng(), torch.enable_grad():
            values = shift(self.trial, self.batch, after)
        log(trainer, values, self.step)
        self.trial, self.batch = None, []


def shift(trial: Trial, batches: list[Batch], after: Mapping[str, Tensor]) -> dict[str, float]:
    """What is logged, from the task before a step and the weights after it; the trial ends with most of those."""
    stages = in_stages(trial.model, lambda: trial(batches[0]))
    _, before = trial.gradient(batches)
    pieces = before.split([p.numel() for p in trial.parameters])
    own = {id(p): piece for p, piece in zip(trial.parameters, pieces, strict=True)}
    names = {id(p): name for name, p in trial.model.named_parameters()}
    cosine, distance = {}, {}
    for i, (layer, weights, _) in enumerate(stages):
        if i == 0:
            continue
        for parameter in stages[i - 1][2]:
            parameter.data.copy_(after[names[id(parameter)]])
        if not weights:
            continue
        _, moved = trial.gradient(batches, weights)
        g, h = exact(torch.cat([own[id(p)] for p in weights])), exact(moved)
        distance[layer] = float((g - h).norm())
        if (length := float(g.norm() * h.norm())) > 0:
            cosine[layer] = float(torch.dot(g, h)) / length
    return {**by_layer("covariate_shift/cosine", cosine), **by_layer("covariate_shift/distance", distance)}


Stage = tuple[str, list[nn.Parameter], list[nn.Parameter]]


def in_stages(model: nn.Module, forward: Callable[[], Any]) -> list[Stage]:
    """The layers in the order of a forward pass: name, trained weights of its own, all parameters that step with it."""
    known = layers(model)
    stages: list[Stage] = []
    waiting: list[nn.Parameter] = []  # what comes before the first layer steps with it
    for name, parameters in in_order(model, forward):
        if name in known:
            stages.append((name, [p for p in parameters if p.requires_grad], [*waiting, *parameters]))
            waiting = []
        elif stages:
            stages[-1][2].extend(parameters)
        else:
            waiting += parameters
    return stages


def in_order(model: nn.Module, forward: Callable[[], Any]) -> list[tuple[str, list[nn.Parameter]]]:
    """The modules that own parameters, with them, in the order in which a forward pass first calls them.

    One that is never called, because only its weight is used, follows the one that was registered before it.
    """
    owners: dict[str, nn.Module] = {}
    parameters: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}.":
            continue  # listed with the module that they make a weight of
        own = list(module.parameters(recurse=False))
        if parametrize.is_parametrized(module):
            own += list(module.parametrizations.parameters())
        if own:
            owners[name], parameters[name] = module, own
    order: list[str] = []
    handles = watched(owners, lambda name, *_: None if name in order else order.append(name))
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
