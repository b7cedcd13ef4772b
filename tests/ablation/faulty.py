"""Callbacks that go wrong on purpose."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
from tests.polling import wait_until

from ablab.lab.run import signals


class Fine(L.Callback):
    """Does nothing."""


class Raises(L.Callback):
    """Fails in the second step, as a bug would."""

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("a bug in the second step")


class RaisesWith(L.Callback):
    """Fails in the second step of one process, with batch norm alone."""

    def __init__(self, *, batch_norm: bool, rank: int) -> None:
        self.batch_norm = batch_norm
        self.rank = rank

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        model: Any = trainer.lightning_module.model
        has = any(type(module).__name__.startswith("BatchNorm") for module in model.modules())
        if trainer.global_step == 2 and trainer.global_rank == self.rank and has == self.batch_norm:
            raise RuntimeError("a bug in the second step")


class RaisesAbove(L.Callback):
    """Fails with large learning rates, as a machine might by chance."""

    def __init__(self, *, lr: float) -> None:
        self.lr = lr

    def on_train_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.optimizers[0].defaults["lr"] > self.lr:
            raise RuntimeError("a bug at large rates")


class Kills(L.Callback):
    """Ends its process at once, as a kernel without memory would."""

    def on_train_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        os._exit(1)


class WaitsFor(L.Callback):
    """Waits before the tenth step until a file is there, or a signal comes: a run that does not end too early.

    Args:
        name: the file is `NAME.now`, in the folder in which the command was given; while a process waits, there is an
            empty file `NAME.PID`. No config names them: what a config names is part of a run's identity.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == 9:
            Path(f"{self.name}.{os.getpid()}").touch()
            wait_until(lambda: Path(f"{self.name}.now").exists() or signals.requested)


class LeavesAChild(L.Callback):
    """The second process starts one of its own, whose number it writes to a file, and raises."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_rank == 1:
            self.file.write_text(str(subprocess.Popen(["sleep", "300"]).pid))
            raise RuntimeError("a bug")


class IsKilled(L.Callback):
    """Is killed while a progress bar is the last line of the log, as by a kernel without memory."""

    def on_train_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        print("Epoch 0:  40%|####      |", end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
