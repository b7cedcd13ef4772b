"""Progress output: a bar on terminals, one line per epoch in log files."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from torch import Tensor

from ablab.screen import is_interactive
from ablab.status import next_delay
from ablab.tasks.task import is_on_progress_bar


def progress() -> ProgressBar:
    """Return a progress bar on an interactive terminal, and `Lines` otherwise (file, pipe, cluster log)."""
    return Bar() if is_interactive() else Lines()


class Bar(TQDMProgressBar):
    """A progress bar per epoch; shows the time left of the run first, since 80 columns cut off the end."""

    BAR_FORMAT = "{l_bar}{bar:10}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}{postfix}"

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.started = 0.0
        self.first = 0  # first step of this process, above 0 in a resumed run

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bars, so that the error message starts on a clean line."""
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        left = {"run": time_left(trainer, time.monotonic() - self.started, self.first)} if trainer.training else {}
        return {**left, **dict(sorted(metrics.items(), key=lambda metric: not metric[0].startswith("val/")))}


class Lines(ProgressBar):
    """Print a line after each epoch, at most one every `seconds`, and always after the last epoch.

    Long epochs, validations and tests also print intermediate lines, at increasing intervals.

    Args:
        seconds: minimum time between two lines.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.started = self.printed = self.epoch_ended = 0.0  # epoch_ended: end time of the last epoch
        self.first = 0
        self.enabled = True

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        """Disable output; Lightning calls this in all processes but rank 0."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.printed = self.epoch_ended = time.monotonic()
        self.first = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_due(time.monotonic()):
            self.print_progress(trainer)

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
            self.print_evaluation("validation", batch_idx + 1, trainer.num_val_batches[dataloader_idx])

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.printed = self.epoch_ended = time.monotonic()

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
            self.print_evaluation("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx])

    def is_due(self, now: float) -> bool:
        """Return whether to print a line within an epoch, rather than only at its end."""
        return self.enabled and now - max(self.printed, self.epoch_ended) >= next_delay(
            now - self.started, self.seconds
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        self.epoch_ended = time.monotonic()
        if self.enabled and (self.epoch_ended - self.printed >= self.seconds or done >= total):
            self.print_progress(trainer)

    def print_progress(self, trainer: L.Trainer) -> None:
        """Print epoch, step, the latest metrics and the time left."""
        self.printed = time.monotonic()
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        spent = self.printed - self.started
        values = ", ".join(
            f"{name} {float(value):.4g}" for name, value in metrics_to_show(trainer.callback_metrics).items()
        )
        epoch = f"epoch {trainer.current_epoch + 1}"
        print(
            f"{epoch}, step {done}/{total:.0f}: {values}; {spent:.0f} s, {time_left(trainer, spent, self.first)}",
            flush=True,
        )

    def print_evaluation(self, what: str, done: int, total: float) -> None:
        """Print the progress of a validation or test."""
        self.printed = time.monotonic()
        print(f"{what}: batch {done} of {total:.0f}", flush=True)


def time_left(trainer: L.Trainer, spent: float, first: int) -> str:
    """Return the estimated time left as text, at the average pace so far, including validations."""
    done, total = trainer.global_step, float(trainer.estimated_stepping_batches)
    if done == first or total == float("inf"):
        return "time left unknown"
    return "done" if done >= total else f"{spent * (total - done) / (done - first):.0f} s left"


def metrics_to_show(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the metrics to show, sorted by name."""
    return {name: value for name, value in sorted(metrics.items()) if is_on_progress_bar(name)}
