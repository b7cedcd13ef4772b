"""Base class of tasks: training and evaluation steps, metrics, optimizers and schedules."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from ablab.data.batch import Batch, Kind
from ablab.data.datamodule import DataModule
from ablab.data.rng import seed_step
from ablab.optim.optimizer import make_optimizer
from ablab.optim.schedules import lr_scheduler_config, unblock_epoch_schedulers
from ablab.tasks.all_reduce import StepAllReduce, is_distributed
from ablab.tasks.metric_state import gather_objects, metric_states, restore_metrics

Stage = Literal["train", "val", "test"]


class Task(L.LightningModule, ABC):
    """Base class of tasks: a LightningModule that trains a model with a loss.

    Logs `train/loss`, `train/lr` and the values in `observed`, to which callbacks add, every `log_every_n_steps` steps.
    At the end of each epoch, logs the metrics of the stage, as `train/accuracy`, `val/loss`, …, over exactly the
    samples of the stage, reduced over all processes.

    Args:
        model: maps inputs (and the mask `valid`, if the batch has one) to logits.
        optimizer: factory of the optimizer, called with parameter groups.
        scheduler: factory of the schedule, called with the optimizer and the total number of steps.
        micro_batch_size: maximum number of samples per forward pass; larger batches are split into micro-batches, whose
            gradients add up to that of the batch. None never splits.
        seed: seed of random operations within a step, such as dropout.
    """

    # validation metrics that can select the best checkpoint, and whether higher or lower is better
    monitorable: ClassVar[dict[str, Literal["max", "min"]]]
    # kinds of data that the task accepts, whatever their targets; if empty, data whose `task_sizes` match its arguments
    takes: ClassVar[tuple[Kind, ...]] = ()
    num_views: ClassVar[int] = 0  # number of augmented views of each sample to request, see `Batch.views`

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.seed = seed
        # loss of the current step; averaged over processes once the backward passes are done
        self.step_loss = torch.zeros(())
        self.is_last_part = True  # whether the current micro-batch is the last of its batch
        self.has_earlier_parts = False  # whether gradients have been accumulated in this step
        self.observed: dict[str, Tensor | float] = {}  # values to log for the current step, by name
        self.step_all_reduce = StepAllReduce()
        self.saved_metric_states: list[dict[str, Any]] | None = None
        self.micro_batch_size = micro_batch_size
        # Not saved as hyperparameters: checkpoints contain tensors and plain data only.
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    def metrics(self, stage: Stage) -> MetricCollection:
        """Return a stage's metrics: the attribute `train_metrics`, `val_metrics` or `test_metrics` of the subclass."""
        return getattr(self, f"{stage}_metrics")

    @abstractmethod
    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        """Update the metrics with a batch."""

    def num_targets(self, batch: Batch) -> int | Tensor:
        """Return the number of targets that the mean loss of a batch is taken over; by default, the samples.

        Tasks that ignore some targets, such as pixels or tokens, return the number of the others as a tensor.
        Micro-batches, and the batches of different processes, are weighted by this number.
        """
        return len(batch.targets)

    def forward(self, batch: Batch) -> Tensor:
        inputs = batch.inputs.to(self.dtype) if batch.inputs.is_floating_point() else batch.inputs
        return self.model(inputs) if batch.valid is None else self.model(inputs, batch.valid)

    def seed_current_step(self) -> None:
        """Seed the random number generators from the run's seed, the step and the rank.

        A resumed run then draws the same numbers as an uninterrupted one, and callbacks that draw have no effect on it.
        """
        step = self.trainer.global_step
        if self.trainer.accumulate_grad_batches > 1:  # batches of one step need different random numbers
            step = self.trainer.current_epoch * int(self.trainer.num_training_batches)
            step += self.trainer.fit_loop.epoch_loop.batch_idx
        seed_step(self.seed, step, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, a scalar; if the batch is split, the contribution of its last micro-batch.

        Runs the backward passes of the earlier micro-batches. Subclasses may override this method like that of any
        LightningModule: `TaskHooks` handles gradients, random seeds and `train/loss`.
        """
        *first, last = batch.parts(self.micro_batch_size)
        self.is_last_part = not first
        if first:
            self.trainer.optimizers[0].zero_grad()
        for part in first:  # all-reduce gradients only with the last micro-batch
            with no_grad_sync(self.trainer.strategy):
                self.trainer.strategy.backward(self.micro_batch_loss(part, batch), None)
        loss = self.micro_batch_loss(last, batch)
        self.is_last_part = True
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear gradients, except those of earlier micro-batches; Lightning calls this after `training_step`."""
        if not self.has_earlier_parts:
            optimizer.zero_grad()

    def update_callback_metrics(self, values: Mapping[str, Tensor | float]) -> None:
        """Make values available to callbacks such as early stopping."""
        self.trainer.callback_metrics.update({name: torch.as_tensor(value) for name, value in values.items()})

    def log_now(self, values: dict[str, Any], step: int) -> None:
        """Log training values immediately; this is the only point that synchronizes with the accelerator.

        `self.log` would add overhead to every step, even if values are logged rarely.
        """
        values = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **values}, step=step)
        shown = {name: value for name, value in values.items() if is_on_progress_bar(name)}
        self.trainer.progress_bar_metrics.update(shown)

    def overrides(self, name: str) -> bool:
        """Return whether a subclass or the instance overrides a method."""
        return is_overridden(self, name, Task)

    def check_overrides(self) -> None:
        """Check that overridden methods are compatible with each other and with the settings.

        Raises:
            ValueError: they are not; names the method and the remedy.
        """
        own_step = self.overrides("training_step")
        if not (self.automatic_optimization or own_step):
            raise ValueError(
                "training_step: with automatic_optimization=False it has to call manual_backward and the optimizer's "
                f"step, and {type(self).__name__} does not override it; do so, or leave automatic_optimization at True"
            )
        if self.micro_batch_size is None:
            return
        if own_step and not mentions(self.training_step, "training_step", "parts"):
            raise ValueError(
                f"training_step: {type(self).__name__} overrides it, so that nothing takes a batch in parts of "
                f"data.micro_batch_size={self.micro_batch_size}; override loss() instead, call "
                "super().training_step(), or set data.micro_batch_size=null"
            )
        if self.overrides("optimizer_zero_grad") and not mentions(
            self.optimizer_zero_grad, "optimizer_zero_grad", "has_earlier_parts"
        ):
            raise ValueError(
                f"optimizer_zero_grad: {type(self).__name__} overrides it, and it would clear the gradients of a "
                f"batch's earlier parts (data.micro_batch_size={self.micro_batch_size}); leave it out, or set "
                "data.micro_batch_size=null"
            )

    def check_data(self, data: DataModule) -> None:
        """Check, before training, that the task can learn from the data; for subclasses to override.

        Raises:
            ValueError: it cannot; names the setting and the remedy.
        """

    def trained_parts(self) -> list[nn.Module]:
        """Return the modules that get separate optimizers and schedules; by default, the whole model."""
        return [self.model]

    def micro_batch_loss(self, part: Batch, batch: Batch) -> Tensor:
        """Return the contribution of a micro-batch to the mean loss of its batch."""
        share = self.target_share(part, batch)
        logits = self(part)
        loss = self.loss(logits, part)
        self.update(self.metrics("train"), logits.detach(), loss.detach(), part)
        return loss if isinstance(share, float) and share == 1 else loss * share

    def target_share(self, part: Batch, batch: Batch) -> float | Tensor:
        """Return the fraction of a batch's targets that is in a micro-batch.

        If processes have different numbers of targets, the denominator is their mean. The average of gradients over
        processes is then the gradient of the mean loss over all targets of all processes.
        """
        if part is batch and not is_distributed():
            return 1.0
        number, total = self.num_targets(part), self.num_targets(batch)
        if not isinstance(total, Tensor):  # samples: all processes have equally many
            return number / total
        if is_distributed():
            number = number * dist.get_world_size()
            dist.all_reduce(total)
        return number / total.clamp(min=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the logits of a batch, as in validation."""
        return self(batch)

    def predictions(self, logits: Tensor) -> dict[str, list[Any]]:
        """Return the predictions for a batch as named columns, for scripts/predict.py."""
        raise NotImplementedError(
            f"{type(self).__name__} has no predictions() for a table; load checkpoints/best.safetensors in a program"
        )

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        logits = self(batch)
        self.update(self.metrics(stage), logits, self.loss(logits, batch), batch)

    def compute_metrics(self, stage: Stage) -> dict[str, Tensor]:
        """Compute the metrics of a stage and return the scalars to log, by name.

        Metrics that no process has updated are left out.
        """
        metrics = self.metrics(stage)
        updates = torch.tensor([metric.update_count for metric in metrics.values()], device=self.device)
        if is_distributed():  # compute() is a collective operation: all processes must agree
            dist.all_reduce(updates)
        return {
            f"{stage}/{label}": scalar
            for (name, metric), num_updates in zip(metrics.items(), updates.tolist(), strict=True)
            if num_updates
            for label, scalar in self.scalars(name, metric.compute())
        }

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """Return the scalars to log for a metric's value, with their names; may leave out undefined (NaN) values."""
        return [(name, value)]

    def restore_metric_states(self) -> None:
        """Restore the training metrics of an epoch that was interrupted by a checkpoint."""
        if self.saved_metric_states is not None:
            restore_metrics(
                self.metrics("train"),
                self.saved_metric_states,
                rank=self.global_rank,
                world_size=self.trainer.world_size,
            )
            self.saved_metric_states = None

    # These hooks run after those of all callbacks, which save the weights that were evaluated.

    def on_validation_end(self) -> None:
        self.set_optimizer_mode("train")

    def on_train_end(self) -> None:
        self.set_optimizer_mode("eval")

    def set_optimizer_mode(self, mode: Literal["train", "eval"]) -> None:
        """Call `train()` or `eval()` of optimizers that have them, such as schedule-free ones, to swap the weights."""
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def configure_callbacks(self) -> list[Callback]:
        return [TaskHooks()]

    def configure_optimizers(self) -> Any:
        # with a gradient scaler, fused optimizers unscale gradients themselves, and nothing before sees the true ones
        fused, total_steps = not uses_grad_scaler(self.trainer), int(self.trainer.estimated_stepping_batches)
        optimizers = [make_optimizer(self.optimizer_factory, part, fused=fused) for part in self.trained_parts()]
        schedules = [lr_scheduler_config(self.scheduler_factory, optimizer, total_steps) for optimizer in optimizers]
        return optimizers, schedules


class TaskHooks(Callback):
    """The hooks of a `Task` around steps and epochs: seeding, losses, metrics and logging.

    They are in a callback instead of the task's own hooks, so that subclasses may override those without calling
    `super()`. The callback runs after all other callbacks and before the hooks of the task.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.restore_metric_states()
        pl_module.set_optimizer_mode("train")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.metrics("train").reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        unblock_epoch_schedulers(trainer)
        pl_module.seed_current_step()
        pl_module.set_optimizer_mode("train")
        pl_module.observed = {"train/lr": trainer.optimizers[0].param_groups[0]["lr"]}
        takes_own_step = pl_module.automatic_optimization and pl_module.overrides("training_step")
        begins_step = batch_idx % trainer.accumulate_grad_batches == 0
        if takes_own_step and begins_step and not pl_module.overrides("optimizer_zero_grad"):
            trainer.optimizers[0].zero_grad()  # or a step that returns None would reuse old gradients

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert isinstance(pl_module, Task)
        loss = loss.detach()
        if uses_grad_scaler(trainer):
            # scaling 1 gives the scaler's factor without synchronizing with the GPU
            loss = loss / trainer.precision_plugin.scaler.scale(torch.ones_like(loss))  # type: ignore[attr-defined]
        pl_module.step_loss = pl_module.step_loss + loss if pl_module.has_earlier_parts else loss
        if pl_module.is_last_part:  # the all-reduce overlaps with the backward pass
            pl_module.step_all_reduce.begin(pl_module.step_loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.has_earlier_parts = not (pl_module.is_last_part and completes_step(trainer))
        if pl_module.is_last_part:
            pl_module.step_loss = pl_module.observed["train/loss"] = pl_module.step_all_reduce.end(pl_module.step_loss)
            if (most := trainer.accumulate_grad_batches) > 1:  # the last step of an epoch may accumulate fewer batches
                number = trainer.fit_loop.epoch_loop.batch_idx % most + 1
                pl_module.observed["train/loss"] = pl_module.step_loss * (most / number)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        assert isinstance(pl_module, Task)
        pl_module.update_callback_metrics(pl_module.observed)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if completes_step(trainer) and (trainer.global_step % every == 0 or trainer.should_stop):
            pl_module.log_now(pl_module.observed, step=trainer.global_step - 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if values := pl_module.compute_metrics("train"):
            pl_module.update_callback_metrics(values)
            pl_module.log_now(values, step=trainer.global_step)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.seed_current_step()
        pl_module.metrics("val").reset()  # an interrupted validation starts over

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        for name, value in pl_module.compute_metrics("val").items():
            pl_module.log(name, value, prog_bar=is_on_progress_bar(name))

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.seed_current_step()
        pl_module.metrics("test").reset()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.log_dict(pl_module.compute_metrics("test"))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Task)
        checkpoint["train_metrics"] = gather_objects(metric_states(pl_module.metrics("train")))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Task)
        pl_module.saved_metric_states = checkpoint.get("train_metrics")

    # Schedule-free optimizers use different weights for training and evaluation. Checkpoints to resume from are saved
    # before this swap at the start of a validation, by a callback that runs earlier.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.set_optimizer_mode("eval")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            unblock_epoch_schedulers(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.set_optimizer_mode("eval")


def completes_step(trainer: L.Trainer) -> bool:
    """Return whether the optimizer steps after the current batch (see `trainer.accumulate_grad_batches`)."""
    number = trainer.accumulate_grad_batches
    return number == 1 or trainer.is_last_batch or (trainer.fit_loop.epoch_loop.batch_idx + 1) % number == 0


def is_overridden(owner: Any, name: str, base: type) -> bool:
    """Return whether a callback, module or data module overrides a method of its base class."""
    return getattr(getattr(owner, name), "__func__", None) is not getattr(base, name)


def mentions(method: Any, *names: str) -> bool:
    """Return whether the code of a method mentions one of the names."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and not {*names}.isdisjoint(code.co_names)


def uses_grad_scaler(trainer: L.Trainer) -> bool:
    """Return whether a gradient scaler is in use (16-mixed precision), which skips steps on overflow."""
    return isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None


def no_grad_sync(strategy: Strategy) -> AbstractContextManager[None]:
    """Return a context in which backward passes do not synchronize gradients between processes."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32, for sums over many values; float64 stays unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_on_progress_bar(name: str) -> bool:
    """Return whether a metric is shown on the progress bar."""
    return name.endswith(("loss", "accuracy", "/rmse", "/mean_iou", "/mmd"))


def make_metrics(metrics: dict[str, Metric]) -> MetricCollection:
    """Return a collection of metrics without compute groups, since tasks pass each metric different arguments."""
    return MetricCollection(dict(metrics), compute_groups=False)
