"""Base classes of diagnostics: schedule, fixed samples, and a copy of the task to experiment on."""

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
from ablab.data.rng import make_generator, seed_step
from ablab.norms.batch import BatchNormLayer
from ablab.norms.weight import LengthAndDirection, other_dims
from ablab.tasks.task import Task

SAMPLE_SEED = 20180529  # seed of the choice of samples: the same for every run on the same training split_batch
MAX_BATCH = 64  # samples per forward pass, if no norm depends on the batch


class CheckedCallback(L.Callback, ABC):
    """A callback that checks its settings against the data and the model before training."""

    @abstractmethod
    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Check that the quantity can be measured.

        Raises:
            ValueError: it cannot; the message names a remedy.
        """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            assert isinstance(pl_module, Task)
            self.check(trainer.datamodule, pl_module.model, trainer.world_size)  # type: ignore[attr-defined]


class Diagnostic(CheckedCallback, ABC):
    """Base class of diagnostics: a quantity measured before every n-th step and for the final weights.

    A measurement does not affect the run: it works on a copy of the task and restores the random state. It is logged in
    a row of its own, with the number of completed steps, independently of `log_every_n_steps`.

    With several processes, all of them measure the same, and rank 0 logs. Weights are measured in float32 (or float64)
    without autocast, whatever the training precision.

    Args:
        every_n_steps: steps between two measurements; the first is before the first step.
        num_samples: number of training samples to measure on; fixed and not augmented.

    Raises:
        ValueError: a value is below 1.
    """

    measures_final_weights = (
        True  # whether to measure the final weights, even if the last measurement was a few steps ago
    )

    def __init__(self, *, every_n_steps: int, num_samples: int) -> None:
        check_at_least(1, every_n_steps=every_n_steps, num_samples=num_samples)
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.last_step: int | None = None  # last measured step
        self.samples: Batch | None = None

    @abstractmethod
    def measure(self, task_copy: TaskCopy, batches: list[Batch], lr: float) -> Mapping[str, float]:
        """Return the values to log.

        Args:
            task_copy: a copy of the task.
            batches: the samples, in mini-batches of `size`.
            lr: learning rate of the next step.
        """

    def size(self, data: DataModule, model: nn.Module, world_size: int) -> int:
        """Return the number of samples per mini-batch, that of training if a norm depends on the batch."""
        seen = normalization_batch_size(data, model, world_size)
        if seen is not None:
            return seen
        return min(self.num_samples, data.micro_batch_size or max(data.forward_size(world_size), MAX_BATCH))

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        """Check the number of samples.

        Raises:
            ValueError: there are fewer training samples, or `num_samples` is less than a mini-batch.
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

    def is_due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step % self.every_n_steps == 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if self.is_due(trainer):
            self.measure_and_log(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # also called when a run is resumed after its last step
        if self.last_step != trainer.global_step and (self.measures_final_weights or self.is_due(trainer)):
            self.measure_and_log(trainer, pl_module)

    def measure_and_log(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Diagnostic and log."""
        assert isinstance(task, Task)
        self.last_step = trainer.global_step
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        with isolate_rng(), torch.enable_grad():
            task_copy = TaskCopy(task, seeds=(task.seed, trainer.global_step, 0))
            values = self.measure(task_copy, self.batches(trainer, task), lr)
        log_row(trainer, values, trainer.global_step)

    def batches(self, trainer: L.Trainer, task: Task) -> list[Batch]:
        """Return the samples on the task's device, in mini-batches of equal size if a norm depends on the batch."""
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self.samples is None:
            self.samples = fixed_samples(data, task, self.num_samples)
        batches = split_batch(self.samples, self.size(data, task.model, trainer.world_size))
        return equal_sized(batches) if sees_batch(task.model) else batches

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]


def check_at_least(least: int, **values: int) -> None:
    """Raise ValueError for a value below `least`, naming its keyword."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}: at least {least} is needed; choose {least} or more")


def log_row(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Log values immediately in a separate row, independently of `log_every_n_steps`."""
    for logger in trainer.loggers:
        if values:
            logger.log_metrics({"epoch": trainer.current_epoch, **values}, step)


def layer_means(title: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return the columns `title/<layer>` and their mean as `title`; empty if no layer has a value."""
    if not values:
        return {}
    mean = sum(values.values()) / len(values)
    return {title: mean, **{f"{title}/{name}": value for name, value in values.items()}}


# The samples ------------------------------------------------------------------------------------------------------


def num_available(data: DataModule) -> int:
    """Return the number of training samples with random access; for a stream, those at its beginning."""
    assert data.splits is not None
    return len(getattr(data.splits.train, "head", data.splits.train))


def fixed_samples(data: DataModule, task: Task, num_samples: int) -> Batch:
    """Return training samples, independent of the run's seed and not augmented, on the task's device."""
    assert data.splits is not None
    chosen = torch.randperm(num_available(data), generator=make_generator(SAMPLE_SEED))[:num_samples].tolist()
    batch = task.transfer_batch_to_device(data.splits.train[chosen], task.device, 0)
    return data.on_after_batch_transfer(batch, 0)  # a batch without seeds is not augmented


def split_batch(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into parts of `size` samples; the last may be smaller."""
    count = len(batch.targets)
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [Batch(*(None if field is None else field[part] for field in batch)) for part in parts]  # type: ignore[arg-type]


def equal_sized(batches: list[Batch]) -> list[Batch]:
    """Return the batches that are as large as the first."""
    return [batch for batch in batches if len(batch.targets) == len(batches[0].targets)]


def normalization_batch_size(data: DataModule, model: nn.Module, world_size: int) -> int | None:
    """Return the number of samples that norms see together in training; None if they normalize each sample alone."""
    if not sees_batch(model):
        return None
    sync = any(isinstance(module, BatchNormLayer) and module.norm.sync for module in model.modules())
    return data.forward_size(world_size) * (world_size if sync else 1)


# The model --------------------------------------------------------------------------------------------------------


def sees_batch(model: nn.Module) -> bool:
    """Return whether the output for a sample depends on the other samples of its batch, in training."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        or any(statistic.batch for statistic in getattr(module, "statistics", ()))
        for module in model.modules()
    )


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a weight of at least two dimensions (linear, convolution, embedding), by name."""
    found = {}
    for name, module in model.named_modules():
        weight = learned_weight(module)
        if weight is not None and weight.dim() >= 2:
            found[name] = module
    return found


def learned_weight(module: nn.Module) -> Tensor | None:
    """Return the parameter behind a module's weight; under weight norm, the direction v rather than the length g.

    Does not access a reparametrized weight itself, since under spectral norm every access updates a buffer.
    """
    if parametrize.is_parametrized(module, "weight"):
        chain: Any = module.parametrizations.weight  # type: ignore[union-attr]
        return chain.original1 if hasattr(chain, "original1") else chain.original
    return module._parameters.get("weight")


class TaskCopy:
    """A copy of a task for experiments, whose loss is a deterministic function of the weights and the batch.

    Running averages are restored and random generators seeded before each forward pass. Norms compute batch statistics
    as in training, but not across processes, since each process has all samples. `NoisyNorms` stays active; other hooks
    are removed.

    Args:
        task: the task to copy; not modified.
        seeds: seed, step and rank that determine the random numbers of a forward pass.
        dropout: whether dropout is active.
    """

    def __init__(self, task: Task, *, seeds: tuple[int, int, int] = (0, 0, 0), dropout: bool = False) -> None:
        self.task = deepcopy(task)
        if task.dtype in (torch.float16, torch.bfloat16):
            self.task.float()
        self.model = self.task.model
        for module in self.task.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                for key in [key for key, hook in hooks.items() if not is_noise_hook(hook)]:
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
        """Switch to training mode, with dropout only if requested."""
        self.task.train()
        if not self.dropout:
            for module in self.model.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.eval()

    @contextmanager
    def twice_differentiable(self) -> Iterator[None]:
        """Use implementations with correct second derivatives, for `hessian_product`.

        Fused attention kernels have no second derivative, and that of `torch._weight_norm` is wrong:
        torch.autograd.gradgradcheck fails (torch 2.13), and its Hessian is not symmetric.
        """
        for module in self.model.modules():
            if isinstance(module, LengthAndDirection | parametrizations._WeightNorm):
                module.forward = partial(length_and_direction, dim=module.dim)  # type: ignore[method-assign]
        with sdpa_kernel(SDPBackend.MATH):
            yield

    def __call__(self, batch: Batch) -> Tensor:
        """Return the logits."""
        for buffer, before in self.buffers:
            buffer.data.copy_(before)  # .data keeps the version counter, so earlier graphs stay valid
        seed_step(*self.seeds)
        return self.task(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return self.task.loss(self(batch), batch)

    def with_weights(self, batches: list[Batch]) -> Iterable[tuple[Batch, float]]:
        """Return each batch with its fraction of all targets."""
        numbers = [float(self.task.num_targets(batch)) for batch in batches]
        return [(batch, number / sum(numbers)) for batch, number in zip(batches, numbers, strict=True)]

    def gradient(self, batches: list[Batch], parameters: list[nn.Parameter] | None = None) -> tuple[float, Tensor]:
        """Return the mean loss over batches, and its gradient for `parameters` (None for all) as one vector."""
        of = self.parameters if parameters is None else parameters
        loss, gradient = 0.0, torch.zeros(())
        for batch, share in self.with_weights(batches):
            part = self.loss(batch) * share
            loss += float(part.detach())
            gradient = flatten_gradients(torch.autograd.grad(part, of, allow_unused=True), of) + gradient.to(
                part.device
            )
        return loss, gradient

    def hessian_product(self, batches: list[Batch], vector: Tensor) -> Tensor:
        """Return the product of the mean loss's Hessian with a vector, by double backward.

        Must be called within `twice_differentiable`.
        """
        product = torch.zeros_like(vector)
        for batch, share in self.with_weights(batches):
            gradients = torch.autograd.grad(self.loss(batch) * share, self.parameters, create_graph=True)
            along = torch.dot(flatten_gradients(gradients, self.parameters), vector)
            product += flatten_gradients(
                torch.autograd.grad(along, self.parameters, allow_unused=True), self.parameters
            )
        return product

    @torch.no_grad()
    def add_to_weights(self, vector: Tensor) -> None:
        """Add a vector to the trainable parameters."""
        start = 0
        for parameter in self.parameters:
            part = vector[start : start + parameter.numel()]
            parameter.add_(part.view_as(parameter))
            start += parameter.numel()


def is_noise_hook(hook: Any) -> bool:
    """Return whether a hook is that of `NoisyNorms`, the only hook that is part of the computation."""
    return isinstance(getattr(hook, "__self__", None), NoisyNorms)


def length_and_direction(length: Tensor, direction: Tensor, *, dim: int) -> Tensor:
    """Compute weight norm, g · v / ‖v‖, from differentiable operations."""
    dims = None if dim == -1 else other_dims(direction, dim % direction.dim())
    return direction * (length / torch.linalg.vector_norm(direction, dim=dims, keepdim=True))


def to_float64(x: Tensor) -> Tensor:
    """Convert to float64 for accurate sums; on the CPU if the device has no float64 (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def flatten_gradients(gradients: Iterable[Tensor | None], parameters: list[nn.Parameter]) -> Tensor:
    """Concatenate gradients to one vector, with zeros for missing gradients."""
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def add_input_hooks(modules: Mapping[str, nn.Module], look: Callable[[str, nn.Module, Any, Any], None]) -> list[Any]:
    """Register hooks that call `look(name, module, args, kwargs)` before each module; return the hooks' handles."""

    def hook(name: str) -> Any:
        return lambda module, arguments, keywords: look(name, module, arguments, keywords)

    return [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
