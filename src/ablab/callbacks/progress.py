"""Progress for a person: a bar on a terminal, a line an epoch in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from torch import Tensor


def progress() -> ProgressBar:
    """A bar where someone can watch it move, lines where not (a file, a pipe, a cluster's log)."""
    return Bar() if sys.stderr.isatty() else Lines()


class Bar(TQDMProgressBar):
    """A bar for each epoch, with loss, accuracy and the time left of the whole run."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.started = 0.0
        self.first = 0  # step of this process: a resumed run has some behind it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.started, self.first = time.monotonic(), trainer.global_step

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training:
            metrics["run"] = time_left(trainer, time.monotonic() - self.started, self.first)
        return metrics


class Lines(ProgressBar):
    """A line after each epoch's validation; long trainings print at most one every `seconds`, and always the last.

    Args:
        seconds: the least time between two lines.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.started = self.printed = 0.0
        self.first = 0
        self.enabled = True

    def enable(self) -> None:
        self.enabled = True

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self.enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.printed = time.monotonic()
        self.first = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.monotonic()
        done, total = trainer.global_step, trainer.estimated_stepping_batches
        spent = now - self.started
        if not self.enabled or (now - self.printed < self.seconds and done < total):
            return
        self.printed = now
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in shown(trainer.callback_metrics).items())
        epoch = f"epoch {trainer.current_epoch + 1}"
        print(
            f"{epoch}, step {done}/{total:.0f}: {values}; {spent:.0f} s, {time_left(trainer, spent, self.first)}",
            flush=True,
        )


def time_left(trainer: L.Trainer, spent: float, first: int) -> str:
    """How long the rest of the training takes at the pace since the first step, in words; validation and all."""
    done, total = trainer.global_step, float(trainer.estimated_stepping_batches)
    if done == first or total == float("inf"):
        return "time left unknown"
    return "done" if done >= total else f"{spent * (total - done) / (done - first):.0f} s left"


def shown(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """The metrics worth a place on the screen: losses and accuracies."""
    return {name: value for name, value in sorted(metrics.items()) if name.endswith(("/loss", "/accuracy"))}
