"""What every task shares: one training step, one evaluation step, the optimizer and its schedule."""

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
from ablab.data.draws import seed_step
from ablab.optim.optimizer import make_optimizer
from ablab.optim.schedules import lr_scheduler_config, unblock_epoch_schedulers
from ablab.tasks.counts import counts, gathered, restore
from ablab.tasks.exchange import Exchange, several

Stage = Literal["train", "val", "test"]


class Task(L.LightningModule, ABC):
    """A model in training.

    Logs `train/loss`, `train/lr` and what callbacks have put into `observed` every `log_every_n_steps` steps, and the
    metrics of a stage at the end of each of its epochs, as `train/accuracy`, `val/loss`, … over exactly the samples of
    that stage, on all processes together.

    Args:
        model: from inputs (and `valid`, where a batch has it) to logits.
        optimizer: makes the optimizer from groups of parameters.
        scheduler: makes the schedule from the optimizer and the number of its steps.
        micro_batch_size: most samples of a forward pass; larger batches are taken in parts, whose gradients add up to
            the whole batch's. None takes every batch whole.
        seed: of the random numbers that a step draws, dropout's for example.
    """

    # the validation metrics that may choose the best checkpoint, and whether more of them is better
    monitorable: ClassVar[dict[str, Literal["max", "min"]]]
    # the kinds of data that it learns from, whatever their targets; empty: data whose `task_sizes` it takes
    takes: ClassVar[tuple[Kind, ...]] = ()
    num_views: ClassVar[int] = 0  # augmented views of each sample that it asks the data for, `Batch.views`

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
        # of the step in hand: what its backward passes were given, the mean over all processes once they are through
        self.step_loss = torch.zeros(())
        self.is_last_part = True  # of the batch in hand, which may be taken in parts
        self.has_earlier_parts = False  # gradients of earlier parts or batches belong to the same step
        self.observed: dict[str, Tensor | float] = {}  # of the step in hand, by the names under which they are logged
        self.exchange = Exchange()
        self.earlier_counts: list[dict[str, Any]] | None = None
        self.micro_batch_size = micro_batch_size
        # Plain attributes, not hyperparameters: a checkpoint then holds tensors and plain data only.
        self.optimizer_factory = optimizer
        self.scheduler_factory = scheduler

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar."""

    def metrics(self, stage: Stage) -> MetricCollection:
        """The metrics of a stage: what the subclass made as `train_metrics`, `val_metrics` or `test_metrics`."""
        return getattr(self, f"{stage}_metrics")

    @abstractmethod
    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        """Count one batch in."""

    def num_targets(self, batch: Batch) -> int | Tensor:
        """Return the number of targets that the mean loss of a batch is taken over: its samples.

        A task that leaves targets out of its mean, such as pixels or tokens that are ignored, counts the others and
        returns a tensor. Parts of a batch, and the batches of several processes, are weighted by it.
        """
        return len(batch.targets)

    def forward(self, batch: Batch) -> Tensor:
        inputs = batch.inputs.to(self.dtype) if batch.inputs.is_floating_point() else batch.inputs
        return self.model(inputs) if batch.valid is None else self.model(inputs, batch.valid)

    def derive_random_numbers(self) -> None:
        """What is drawn from here on depends on the seed, the step and the process, not on what was drawn before.

        A resumed run then draws what it would have drawn, and a callback that draws changes nothing.
        """
        step = self.trainer.global_step
        if self.trainer.accumulate_grad_batches > 1:  # the batches of one step draw differently
            step = self.trainer.current_epoch * int(self.trainer.num_training_batches)
            step += self.trainer.fit_loop.epoch_loop.batch_idx
        seed_step(self.seed, step, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, a scalar; of one that is taken in parts, what its last part adds to it.

        The parts before have their backward passes here. A subclass may override it as any LightningModule does:
        gradients, randomness and `train/loss` are taken care of by `TaskHooks`.
        """
        *first, last = batch.parts(self.micro_batch_size)
        self.is_last_part = not first
        if first:
            self.trainer.optimizers[0].zero_grad()
        for part in first:  # their gradients are added up before those of the last, which alone are exchanged
            with without_exchange(self.trainer.strategy):
                self.trainer.strategy.backward(self.part_of_loss(part, batch), None)
        loss = self.part_of_loss(last, batch)
        self.is_last_part = True
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, which Lightning asks for after `training_step`; those of earlier parts stay."""
        if not self.has_earlier_parts:
            optimizer.zero_grad()

    def make_known(self, values: Mapping[str, Tensor | float]) -> None:
        """Have callbacks find values by their names, as early stopping does."""
        self.trainer.callback_metrics.update({name: torch.as_tensor(value) for name, value in values.items()})

    def tell(self, values: dict[str, Any], step: int) -> None:
        """Log what was found in training, at once: the only moment at which the CPU waits for an accelerator.

        `self.log` would do work in every step for what is logged now and then.
        """
        values = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **values}, step=step)
        shown = {name: value for name, value in values.items() if on_the_bar(name)}
        self.trainer.progress_bar_metrics.update(shown)

    def overrides(self, name: str) -> bool:
        """Return whether a method is a subclass's own, or the instance's."""
        return is_own(self, name, Task)

    def check_overrides(self) -> None:
        """Refuse overridden methods that do not go together.

        Raises:
            ValueError: names the method and the remedy.
        """
        own_step = self.overrides("training_step")
        if not (self.automatic_optimization or own_step):
            raise ValueError(
                "training_step: with automatic_optimization=False it has to call manual_backward and the optimizer's "
                f"step, and {type(self).__name__} does not override it; do so, or leave automatic_optimization at True"
            )
        if self.micro_batch_size is None:
            return
        if own_step and not refers_to(self.training_step, "training_step", "parts"):
            raise ValueError(
                f"training_step: {type(self).__name__} overrides it, so that nothing takes a batch in parts of "
                f"data.micro_batch_size={self.micro_batch_size}; override loss() instead, call "
                "super().training_step(), or set data.micro_batch_size=null"
            )
        if self.overrides("optimizer_zero_grad") and not refers_to(
            self.optimizer_zero_grad, "optimizer_zero_grad", "has_earlier_parts"
        ):
            raise ValueError(
                f"optimizer_zero_grad: {type(self).__name__} overrides it, and it would clear the gradients of a "
                f"batch's earlier parts (data.micro_batch_size={self.micro_batch_size}); leave it out, or set "
                "data.micro_batch_size=null"
            )

    def check_data(self, data: DataModule) -> None:
        """Refuse data that the task cannot learn from, before the training; a subclass says which.

        Raises:
            ValueError: names the setting and the remedy.
        """

    def trained_parts(self) -> list[nn.Module]:
        """Return the parts of the model that have an optimizer and a schedule of their own; by default, the model."""
        return [self.model]

    def part_of_loss(self, part: Batch, batch: Batch) -> Tensor:
        """What a part of a batch adds to the batch's mean loss."""
        share = self.share(part, batch)
        logits = self(part)
        loss = self.loss(logits, part)
        self.update(self.metrics("train"), logits.detach(), loss.detach(), part)
        return loss if isinstance(share, float) and share == 1 else loss * share

    def share(self, part: Batch, batch: Batch) -> float | Tensor:
        """Return the share of a part in the targets of its batch.

        Gradients are averaged over processes. Where these count different numbers of targets, a share is of their mean
        number, so that the average is the gradient of the mean over the targets of all processes.
        """
        if part is batch and not several():
            return 1.0
        number, total = self.num_targets(part), self.num_targets(batch)
        if not isinstance(total, Tensor):  # samples, of which all processes have the same number
            return number / total
        if several():
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
        """Return the predictions for a batch as columns by their names, for scripts/predict.py."""
        raise NotImplementedError(
            f"{type(self).__name__} has no predictions() for a table; load checkpoints/best.safetensors in a program"
        )

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        logits = self(batch)
        self.update(self.metrics(stage), logits, self.loss(logits, batch), batch)

    def counted(self, stage: Stage) -> dict[str, Tensor]:
        """Return what a stage's metrics have counted, by the names under which it is logged.

        A metric that no process has updated is left out, and so is a value that is NaN because nothing was counted.
        """
        metrics = self.metrics(stage)
        updates = torch.tensor([metric.update_count for metric in metrics.values()], device=self.device)
        if several():  # computing a metric is collective, so that all processes have to agree
            dist.all_reduce(updates)
        return {
            f"{stage}/{label}": scalar
            for (name, metric), num_updates in zip(metrics.items(), updates.tolist(), strict=True)
            if num_updates
            for label, scalar in self.scalars(name, metric.compute())
        }

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """What is logged of a metric's value, each under its name."""
        return [(name, value)]

    def restore_counts(self) -> None:
        """Have the metrics of an epoch that a checkpoint interrupted go on from what each process had counted."""
        if self.earlier_counts is not None:
            restore(
                self.metrics("train"), self.earlier_counts, rank=self.global_rank, world_size=self.trainer.world_size
            )
            self.earlier_counts = None

    # After all callbacks, which save the weights that were evaluated.

    def on_validation_end(self) -> None:
        self.switch("train")

    def on_train_end(self) -> None:
        self.switch("eval")

    def switch(self, mode: Literal["train", "eval"]) -> None:
        """Tell optimizers that know of it which weights the model is to have."""
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def configure_callbacks(self) -> list[Callback]:
        return [TaskHooks()]

    def configure_optimizers(self) -> Any:
        # a fused optimizer unscales gradients itself, and nobody before it sees what they are
        fused, total_steps = not scaled(self.trainer), int(self.trainer.estimated_stepping_batches)
        optimizers = [make_optimizer(self.optimizer_factory, part, fused=fused) for part in self.trained_parts()]
        schedules = [lr_scheduler_config(self.scheduler_factory, optimizer, total_steps) for optimizer in optimizers]
        return optimizers, schedules


class TaskHooks(Callback):
    """The work of a `Task` around its steps and epochs: seeds, losses, metrics, and their logging.

    It is done in a callback, and not in the task's own hooks, so that a subclass may override any of those without
    `super()`, as of every LightningModule. It runs after the other callbacks, and before the task's hooks.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.restore_counts()
        pl_module.switch("train")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.metrics("train").reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Task)
        unblock_epoch_schedulers(trainer)
        pl_module.derive_random_numbers()
        pl_module.switch("train")
        pl_module.observed = {"train/lr": trainer.optimizers[0].param_groups[0]["lr"]}
        takes_own_step = pl_module.automatic_optimization and pl_module.overrides("training_step")
        begins_step = batch_idx % trainer.accumulate_grad_batches == 0
        if takes_own_step and begins_step and not pl_module.overrides("optimizer_zero_grad"):
            trainer.optimizers[0].zero_grad()  # a step that returns None must not repeat the one before

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        assert isinstance(pl_module, Task)
        loss = loss.detach()
        if scaled(trainer):
            # what the scaler makes of one is its factor, which the CPU does not wait for
            loss = loss / trainer.precision_plugin.scaler.scale(torch.ones_like(loss))  # type: ignore[attr-defined]
        pl_module.step_loss = pl_module.step_loss + loss if pl_module.has_earlier_parts else loss
        if pl_module.is_last_part:  # the all-reduce overlaps with the backward pass
            pl_module.exchange.begin(pl_module.step_loss)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.has_earlier_parts = not (pl_module.is_last_part and completes_step(trainer))
        if pl_module.is_last_part:
            pl_module.step_loss = pl_module.observed["train/loss"] = pl_module.exchange.end(pl_module.step_loss)
            if (most := trainer.accumulate_grad_batches) > 1:  # an epoch's last step may have fewer batches
                number = trainer.fit_loop.epoch_loop.batch_idx % most + 1
                pl_module.observed["train/loss"] = pl_module.step_loss * (most / number)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        assert isinstance(pl_module, Task)
        pl_module.make_known(pl_module.observed)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if completes_step(trainer) and (trainer.global_step % every == 0 or trainer.should_stop):
            pl_module.tell(pl_module.observed, step=trainer.global_step - 1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if counted := pl_module.counted("train"):
            pl_module.make_known(counted)
            pl_module.tell(counted, step=trainer.global_step)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.derive_random_numbers()
        pl_module.metrics("val").reset()  # a validation that was broken off is done anew

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        for name, value in pl_module.counted("val").items():
            pl_module.log(name, value, prog_bar=on_the_bar(name))

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.derive_random_numbers()
        pl_module.metrics("test").reset()

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.log_dict(pl_module.counted("test"))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Task)
        checkpoint["train_metrics"] = gathered(counts(pl_module.metrics("train")))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, Task)
        pl_module.earlier_counts = checkpoint.get("train_metrics")

    # A schedule-free optimizer evaluates other weights than it steps from. A checkpoint to resume from is saved before
    # the switch at a validation's start, by a callback before this one.

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.switch("eval")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            unblock_epoch_schedulers(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        pl_module.switch("eval")


def completes_step(trainer: L.Trainer) -> bool:
    """Return whether the optimizer takes a step after the batch in hand (`trainer.accumulate_grad_batches`)."""
    number = trainer.accumulate_grad_batches
    return number == 1 or trainer.is_last_batch or (trainer.fit_loop.epoch_loop.batch_idx + 1) % number == 0


def is_own(owner: Any, name: str, base: type) -> bool:
    """Return whether a method of a callback, a module or a data module is not the one of its base class."""
    return getattr(getattr(owner, name), "__func__", None) is not getattr(base, name)


def refers_to(method: Any, *names: str) -> bool:
    """Return whether a method's own code mentions one of the names."""
    code = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and not {*names}.isdisjoint(code.co_names)


def scaled(trainer: L.Trainer) -> bool:
    """Whether gradients are multiplied by a scaler's factor (16-mixed), which leaves steps out where they overflow."""
    return isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None


def without_exchange(strategy: Strategy) -> AbstractContextManager[None]:
    """Backward passes within leave each process its own gradients."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precisions to float32, for sums over many values; float64 stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_the_bar(name: str) -> bool:
    """Whether a metric is worth a place on the progress bar."""
    return name.endswith(("loss", "accuracy", "/rmse", "/mean_iou", "/mmd"))


def collection(metrics: dict[str, Metric]) -> MetricCollection:
    """Metrics that share no state: each is updated with what it needs, so none is computed for another's sake."""
    return MetricCollection(dict(metrics), compute_groups=False)
