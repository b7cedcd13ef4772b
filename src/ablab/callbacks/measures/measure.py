"""What measures share: when they measure, on which samples, and a copy of the task to try things on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize

from ablab.callbacks.noisy_norms import NoisyNorms
from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.data.draws import generator, seed_step
from ablab.norms.batch import BatchNormLayer
from ablab.norms.weight import LengthAndDirection, other_dims
from ablab.tasks.task import Task

PROBE = 20180529  # draws the samples that are measured on: the same for every run on the same training split
AT_ONCE = 64  # samples of a forward pass, where a norm does not care how many they are


class Checked(L.Callback, ABC):
    """A callback that says what it cannot measure before anything is trained."""

    @abstractmethod
    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: with the remedy.
        """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            assert isinstance(pl_module, Task)
            self.check(trainer.datamodule, pl_module.model, trainer.world_size)  # type: ignore[attr-defined]


class Measure(Checked, ABC):
    """Something of a run that is measured before every so many steps, and of its last weights.

    A measurement changes nothing: it works on a copy of the task and puts the random numbers back. It is logged
    whenever it is made, in a row of its own, with the number of steps that led to the weights.

    Under several processes each of them measures the same, and what the first finds is logged. The weights are measured
    in float32 at least and without autocast, whatever precision they are trained in.

    Args:
        every_n_steps: steps between two measurements; the first is before the first step.
        num_samples: training samples to measure on, always the same ones and not augmented.

    Raises:
        ValueError: a value that makes no sense.
    """

    measures_last = True  # whether the last weights are measured, however few steps after the measurement before

    def __init__(self, *, every_n_steps: int, num_samples: int) -> None:
        at_least(1, every_n_steps=every_n_steps, num_samples=num_samples)
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.last_step: int | None = None  # that was measured
        self.samples: Batch | None = None

    @abstractmethod
    def measure(self, trial: Trial, batches: list[Batch], lr: float) -> Mapping[str, float]:
        """What is logged.

        Args:
            trial: a copy of the task.
            batches: the samples, in mini-batches of `size`.
            lr: the learning rate of the step that follows.
        """

    def size(self, data: DataModule, model: nn.Module, world_size: int) -> int:
        """The samples of a mini-batch: as many as in training where a norm sees them together."""
        seen = seen_together(data, model, world_size)
        if seen is not None:
            return seen
        return min(self.num_samples, data.micro_batch_size or max(data.forward_size(world_size), AT_ONCE))

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Refuse what cannot be measured, before anything is trained.

        Raises:
            ValueError: more samples than there are, or fewer than a mini-batch.
        """
        have = num_available(data)
        if self.num_samples > have:
            raise ValueError(
                f"num_samples={self.num_samples}: {type(self).__name__} can be measured on the {have} training samples "
                f"that there are; choose at most {have}"
            )
        size = self.size(data, model, world_size)
        if self.num_samples < size:
            raise ValueError(
                f"num_samples={self.num_samples}: the model's norm sees the {size} samples of a forward pass of "
                f"training together; choose a multiple of {size}, for {type(self).__name__}"
            )

    def due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if self.due(trainer):
            self.take(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a run that is resumed after its last step comes here again
        if self.last_step != trainer.global_step and (self.measures_last or self.due(trainer)):
            self.take(trainer, pl_module)

    def take(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Measure, and log it."""
        assert isinstance(task, Task)
        self.last_step = trainer.global_step
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        with isolate_rng(), torch.enable_grad():
            trial = Trial(task, seeds=(task.seed, trainer.global_step, 0))
            values = self.measure(trial, self.batches(trainer, task), lr)
        log(trainer, values, trainer.global_step)

    def batches(self, trainer: L.Trainer, task: Task) -> list[Batch]:
        """The samples, on the task's device; all mini-batches have the same size where a norm sees it."""
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self.samples is None:
            self.samples = probe(data, task, self.num_samples)
        batches = split(self.samples, self.size(data, task.model, trainer.world_size))
        return full(batches) if sees_batch(task.model) else batches

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]


def at_least(least: int, **values: int) -> None:
    """Refuse what is less."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} is needed; choose {least} or more")


def log(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Log values in a row of their own, whatever `log_every_n_steps` says."""
    for logger in trainer.loggers:
        if values:
            logger.log_metrics({"epoch": trainer.current_epoch, **values}, step)


def by_layer(title: str, values: Mapping[str, float]) -> dict[str, float]:
    """The columns `title/<layer>`, and their mean as `title`; nothing if no layer has a value."""
    if not values:
        return {}
    mean = sum(values.values()) / len(values)
    return {title: mean, **{f"{title}/{name}": value for name, value in values.items()}}


# The samples ------------------------------------------------------------------------------------------------------


def num_available(data: DataModule) -> int:
    """The training samples that can be asked for by their number; of a stream, those at its beginning."""
    assert data.splits is not None
    return len(getattr(data.splits.train, "head", data.splits.train))


def probe(data: DataModule, task: Task, num_samples: int) -> Batch:
    """Training samples that do not depend on the run's seed, not augmented, on the task's device."""
    assert data.splits is not None
    chosen = torch.randperm(num_available(data), generator=generator(PROBE))[:num_samples].tolist()
    batch = task.transfer_batch_to_device(data.splits.train[chosen], task.device, 0)
    return data.on_after_batch_transfer(batch, 0)  # without seeds it is not augmented


def split(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of `size` samples; the last may be smaller."""
    count = len(batch.targets)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [Batch(*(None if field is None else field[part] for field in batch)) for part in parts]  # type: ignore[arg-type]


def full(batches: list[Batch]) -> list[Batch]:
    """Those that are as large as the first."""
    return [batch for batch in batches if len(batch.targets) == len(batches[0].targets)]


def seen_together(data: DataModule, model: nn.Module, world_size: int) -> int | None:
    """The samples that the model's norms see together in training; None where each is seen alone."""
    if not sees_batch(model):
        return None
    sync = any(isinstance(module, BatchNormLayer) and module.norm.sync for module in model.modules())
    return data.forward_size(world_size) * (world_size if sync else 1)


# The model --------------------------------------------------------------------------------------------------------


def sees_batch(model: nn.Module) -> bool:
    """Whether what a model makes of a sample depends on the others of its batch, in training."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        or any(statistic.batch for statistic in getattr(module, "statistics", ()))
        for module in model.modules()
    )


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that own a weight of two dimensions or more, by name: linear maps, convolutions, embeddings."""
    found = {}
    for name, module in model.named_modules():
        weight = direction(module)
        if weight is not None and weight.dim() >= 2:
            found[name] = module
    return found


def direction(module: nn.Module) -> Tensor | None:
    """The parameter that a module's weight is, or that carries its direction: under weight norm v, not the length g.

    A reparametrized weight itself is not asked for: under spectral norm every access moves a state.
    """
    if parametrize.is_parametrized(module, "weight"):
        chain: Any = module.parametrizations.weight  # type: ignore[union-attr]
        return chain.original1 if hasattr(chain, "original1") else chain.original
    return module._parameters.get("weight")


class Trial:
    """A copy of a task to try things on.

    Its loss is a function of the weights and the batch alone: running averages are put back before each forward pass,
    and what is drawn is that of one step. Norms take their statistics as in training, but not over processes: each has
    all samples. What disturbs the forward pass, as `NoisyNorms` does, disturbs it here.

    Args:
        task: stays as it is.
        seeds: seed, step and process that the draws of a forward pass depend on.
        dropout: whether there is any.
    """

    def __init__(self, task: Task, *, seeds: tuple[int, int, int] = (0, 0, 0), dropout: bool = False) -> None:
        self.task = deepcopy(task)
        if task.dtype in (torch.float16, torch.bfloat16):
            self.task.float()
        self.model = self.task.model
        for module in self.task.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                for key in [key for key, hook in hooks.items() if not is_noise(hook)]:
                    del hooks[key]
            if isinstance(module, BatchNormLayer) and module.norm.sync:
                module.norm.sync = False
        self.seeds = seeds
        self.dropout = dropout
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.train()

    def train(self) -> None:
        """As in training, with its loss."""
        self.task.train()
        if not self.dropout:
            for module in self.model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()

    @contextmanager
    def twice_differentiable(self) -> Iterator[None]:
        """Within, second derivatives are right: attention's fused kernels have none, and weight norm's are wrong.

        torch.autograd.gradgradcheck fails for `torch._weight_norm` (torch 2.13), and its Hessian is not symmetric.
        """
        for module in self.model.modules():
            if isinstance(module, LengthAndDirection | parametrizations._WeightNorm):
                module.forward = partial(length_and_direction, dim=module.dim)  # type: ignore[method-assign]
        with sdpa_kernel(SDPBackend.MATH):
            yield

    def __call__(self, batch: Batch) -> Tensor:
        """The logits."""
        for buffer, before in self.buffers:
            buffer.data.copy_(before)  # data: what an earlier forward pass has kept stays valid for its backward
        seed_step(*self.seeds)
        return self.task(batch)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return self.task.loss(self(batch), batch)

    def shares(self, batches: list[Batch]) -> Iterable[tuple[Batch, float]]:
        """Each batch with the share of all targets that is in it."""
        numbers = [float(self.task.num_targets(batch)) for batch in batches]
        return [(batch, number / sum(numbers)) for batch, number in zip(batches, numbers, strict=True)]

    def gradient(self, batches: list[Batch], parameters: list[nn.Parameter] | None = None) -> tuple[float, Tensor]:
        """The mean loss over batches, and its gradient by some parameters, by all if None, as one vector."""
        of = self.parameters if parameters is None else parameters
        loss, gradient = 0.0, torch.zeros(())
        for batch, share in self.shares(batches):
            part = self.loss(batch) * share
            loss += float(part.detach())
            gradient = flat(torch.autograd.grad(part, of, allow_unused=True), of) + gradient.to(part.device)
        return loss, gradient

    def curvature(self, batches: list[Batch], vector: Tensor) -> Tensor:
        """The product of the mean loss's Hessian with a vector, by backward through the backward pass.

        To be called within `twice_differentiable`.
        """
        product = torch.zeros_like(vector)
        for batch, share in self.shares(batches):
            gradients = torch.autograd.grad(self.loss(batch) * share, self.parameters, create_graph=True)
            along = torch.dot(flat(gradients, self.parameters), vector)
            product += flat(torch.autograd.grad(along, self.parameters, allow_unused=True), self.parameters)
        return product

    @torch.no_grad()
    def move(self, vector: Tensor) -> None:
        """Add a vector to the weights."""
        start = 0
        for parameter in self.parameters:
            part = vector[start : start + parameter.numel()]
            parameter.add_(part.view_as(parameter))
            start += parameter.numel()


def is_noise(hook: Any) -> bool:
    """Whether a hook is part of what is computed; others look, or serve the processes of a run."""
    return isinstance(getattr(hook, "__self__", None), NoisyNorms)


def length_and_direction(length: Tensor, direction: Tensor, *, dim: int) -> Tensor:
    """Weight norm by its formula, g · v / ‖v‖."""
    dims = None if dim == -1 else other_dims(direction, dim % direction.dim())
    return direction * (length / torch.linalg.vector_norm(direction, dim=dims, keepdim=True))


def exact(x: Tensor) -> Tensor:
    """In float64, to sum up; on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def flat(gradients: Iterable[Tensor | None], parameters: list[nn.Parameter]) -> Tensor:
    """Gradients as one vector, zero where there is none."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def watched(modules: Mapping[str, nn.Module], look: Callable[[str, nn.Module, Any, Any], None]) -> list[Any]:
    """Have `look` called before each of some modules, with its name and what it is given; gives the hooks' handles."""

    def hook(name: str) -> Any:
        return lambda module, arguments, keywords: look(name, module, arguments, keywords)

    return [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
