"""Progress for a person: a bar on a terminal, a line an epoch in a log file."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from torch import Tensor

from ablab.screen import watched
from ablab.tasks.task import is_on_progress_bar
from ablab.waiting import pause


def progress() -> ProgressBar:
    """A bar where someone can watch it move, lines where not (a file, a pipe, a cluster's log)."""
    return Bar() if watched() else Lines()


class Bar(TQDMProgressBar):
    """A bar for each epoch, the time left of the whole run first: what is behind does not fit 80 columns."""

    BAR_FORMAT = "{l_bar}{bar:10}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}"

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.started = 0.0
        self.first = 0  # step of this process: a resumed run has some behind it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the line to what will be said of it."""
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        left = {"run": time_left(trainer, time.monotonic() - self.started, self.first)} if trainer.training else {}
        return {**left, **dict(sorted(metrics.items(), key=lambda metric: not metric[0].startswith("val/")))}


class Lines(ProgressBar):
    """A line after each epoch's validation; long trainings print at most one every `seconds`, and always the last.

    An epoch, a validation or a test that takes longer says how far it is, more and more rarely.

    Args:
        seconds: the least time between two lines.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.started = self.printed = self.turned = 0.0  # turned: when the last epoch ended
        self.first = 0
        self.enabled = True

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.printed = self.turned = time.monotonic()
        self.first = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due(time.monotonic()):
            self.say(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_due(time.monotonic()) and not trainer.sanity_checking:
            self.say_evaluating("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.printed = self.turned = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.is_due(time.monotonic()):
            self.say_evaluating("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx])

    def is_due(self, now: float) -> bool:
        """Whether a line is, within an epoch; short ones wait for its end."""
        return self.enabled and now - max(self.printed, self.turned) >= pause(now - self.started, self.seconds)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        self.turned = time.monotonic()
        if self.enabled and (self.turned - self.printed >= self.seconds or done >= total):
            self.say(trainer)

    def say(self, trainer: L.Trainer) -> None:
        """How far the training is, what was measured last, and how long it will go on."""
        self.printed = time.monotonic()
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        spent = self.printed - self.started
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in shown(trainer.callback_metrics).items())
        epoch = f"epoch {trainer.current_epoch + 1}"
        print(
            f"{epoch}, step {done}/{total:.0f}: {values}; {spent:.0f} s, {time_left(trainer, spent, self.first)}",
            flush=True,
        )

    def say_evaluating(self, what: str, done: int, total: float) -> None:
        """How far a validation or a test is."""
        self.printed = time.monotonic()
        print(f"{what}: batch {done} of {total:.0f}", flush=True)


def time_left(trainer: L.Trainer, spent: float, first: int) -> str:
    """How long the rest of the training takes at the pace since the first step, in words; validation and all."""
    done, total = trainer.global_step, float(trainer.estimated_stepping_batches)
    if done == first or total == float("inf"):
        return "time left unknown"
    return "done" if done >= total else f"{spent * (total - done) / (done - first):.0f} s left"


def shown(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics that are worth a place on the screen."""
    return {name: value for name, value in sorted(metrics.items()) if is_on_progress_bar(name)}
