"""What every task shares: one training step, one evaluation step, the optimizer and its schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from ablab.data.batch import Batch
from ablab.data.draws import seed_step
from ablab.optim.optimizer import make_optimizer
from ablab.tasks.counts import counts, gathered, restore
from ablab.tasks.exchange import Exchange

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
        self.step_loss = torch.zeros(())  # of the batch in hand, on all processes once its gradients are
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

    def forward(self, batch: Batch) -> Tensor:
        inputs = batch.inputs.to(self.dtype) if batch.inputs.is_floating_point() else batch.inputs
        return self.model(inputs) if batch.valid is None else self.model(inputs, batch.valid)

    def derive_random_numbers(self) -> None:
        """What is drawn from here on depends on the seed, the step and the process, not on what was drawn before.

        A resumed run then draws what it would have drawn, and a callback that draws changes nothing.
        """
        seed_step(self.seed, self.trainer.global_step, self.global_rank)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.derive_random_numbers()

    def on_validation_epoch_start(self) -> None:
        self.derive_random_numbers()
        self.metrics("val").reset()  # a validation that was broken off is done anew

    def on_test_epoch_start(self) -> None:
        self.derive_random_numbers()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        optimizer = self.trainer.optimizers[0]
        *first, last = batch.parts(self.micro_batch_size)
        if first:
            optimizer.zero_grad()
        total: Tensor | float = 0.0
        for part in first:  # their gradients are added up before those of the last, which alone are exchanged
            with without_exchange(self.trainer.strategy):
                loss = self.part_of_loss(part, batch)
                self.trainer.strategy.backward(loss, None)
            total += loss.detach()
        loss = self.part_of_loss(last, batch)
        if not first:
            optimizer.zero_grad()  # late: the forward pass finds old gradients where the backward pass puts new ones
        self.step_loss = total + loss.detach()
        self.exchange.begin(self.step_loss)
        self.observed["train/lr"] = optimizer.param_groups[0]["lr"]
        return loss

    def on_after_backward(self) -> None:
        self.step_loss = self.observed["train/loss"] = self.exchange.end(self.step_loss)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.make_known(self.observed)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.global_step % every == 0 or self.trainer.should_stop:
            self.tell(self.observed, step=self.trainer.global_step - 1)

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

    def optimizer_zero_grad(self, *arguments: Any) -> None:
        """Nothing: Lightning calls it between a step's forward and backward pass, when parts have left gradients."""

    def part_of_loss(self, part: Batch, batch: Batch) -> Tensor:
        """What a part of a batch adds to the batch's mean loss."""
        logits = self(part)
        loss = self.loss(logits, part)
        self.update(self.metrics("train"), logits.detach(), loss.detach(), part)
        return loss if part is batch else loss * (len(part.targets) / len(batch.targets))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        logits = self(batch)
        self.update(self.metrics(stage), logits, self.loss(logits, batch), batch)

    def on_train_epoch_end(self) -> None:
        if counted := self.counted("train"):
            self.make_known(counted)
            self.tell(counted, step=self.trainer.global_step)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.counted("val").items():
            self.log(name, value, prog_bar=on_the_bar(name))

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.counted("test"))

    def counted(self, stage: Stage) -> dict[str, Tensor]:
        """What a stage's metrics have counted, by the names under which it is logged; they start counting anew."""
        metrics = self.metrics(stage)
        values = [pair for name, value in metrics.compute().items() for pair in self.scalars(name, value)]
        metrics.reset()
        return {f"{stage}/{label}": scalar for label, scalar in values}

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """What is logged of a metric's value, each under its name."""
        return [(name, value)]

    # The metrics of an epoch that a checkpoint interrupts go on from what each process had counted.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_metrics"] = gathered(counts(self.metrics("train")))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.earlier_counts = checkpoint.get("train_metrics")

    def on_train_start(self) -> None:
        if self.earlier_counts is not None:
            restore(
                self.metrics("train"), self.earlier_counts, rank=self.global_rank, world_size=self.trainer.world_size
            )
            self.earlier_counts = None
        self.switch("train")

    # A schedule-free optimizer evaluates other weights than it steps from. Callbacks' hooks come first: a state to go
    # on from is saved before the switch at a validation's start, and the best weights before the one at its end.

    def on_validation_start(self) -> None:
        self.switch("eval")

    def on_validation_end(self) -> None:
        self.switch("train")

    def on_train_end(self) -> None:
        self.switch("eval")

    def switch(self, mode: Literal["train", "eval"]) -> None:
        """Tell optimizers that know of it which weights the model is to have."""
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def configure_optimizers(self) -> Any:
        # a fused optimizer unscales gradients itself, and nobody before it sees what they are
        optimizer = make_optimizer(self.optimizer_factory, self.model, fused=not scaled(self.trainer))
        schedule = self.scheduler_factory(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def scaled(trainer: L.Trainer) -> bool:
    """Whether gradients are multiplied by a scaler's factor (16-mixed), which leaves steps out where they overflow."""
    return isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None


def without_exchange(strategy: Strategy) -> AbstractContextManager[None]:
    """Backward passes within leave each process its own gradients."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def on_the_bar(name: str) -> bool:
    """Whether a metric is worth a place on the progress bar."""
    return name.endswith(("/loss", "/accuracy"))


def collection(metrics: dict[str, Metric]) -> MetricCollection:
    """Metrics that share no state: each is updated with what it needs, so none is computed for another's sake."""
    return MetricCollection(dict(metrics), compute_groups=False)
