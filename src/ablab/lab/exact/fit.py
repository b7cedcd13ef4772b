"""Train any LightningModule with exact resuming and without a config: for notebooks and other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from ablab.disk import Lock
from ablab.errors import ConfigError
from ablab.lab.exact.checkpoints import Checkpoints
from ablab.lab.exact.exact import Exact, seed_before_fit
from ablab.lab.exact.loaders import print_warning
from ablab.lab.guests import attach_exact
from ablab.lab.loggers.csv_file import MetricsCSV, read_rows
from ablab.lab.run import signals
from ablab.lab.run.checkpoint_files import VerifiedFiles, newest_valid
from ablab.lab.run.folder import LOCK
from ablab.lab.run.restorable import check_guest_checkpoint
from ablab.tasks.task import is_overridden


def fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: Any = None,
    *,
    folder: str | Path,
    seed: int = 0,
    every_n_steps: int | None = None,
    every_n_minutes: float = 10.0,
    keep: int = 2,
    trust: bool = False,
) -> None:
    """Train a module, or resume from the newest valid checkpoint of the folder, to the same bits.

    Args:
        trainer: a new trainer, configured as for plain Lightning; callbacks and a logger are added to it.
        module: any LightningModule, built in the same way each time.
        data: a LightningDataModule, or one or more training loaders; None uses the loaders of the module.
        folder: for `checkpoints/` and `metrics.csv`; created if it does not exist.
        seed: of the batch order, augmentation and random numbers within steps.
        every_n_steps, every_n_minutes, keep: see `Checkpoints`.
        trust: load pickled objects that the module puts into its checkpoints. Unpickling may execute code: use it only
            for a folder that you trust as you trust code.

    Raises:
        ConfigError: another process trains in this folder, or no checkpoint in it fits the module.
        Stopped: a signal has asked the process to stop; everything is saved.
    """
    if trainer.fit_loop.epoch_progress.total.ready:
        raise ConfigError("trainer: it has trained already; make a new one, with which this call resumes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saving = Checkpoints(
        monitor=None, mode="min", keep=keep, every_n_steps=every_n_steps, every_n_minutes=every_n_minutes
    )
    others = [c for c in trainer.callbacks if not isinstance(c, Checkpoints | Exact)]  # type: ignore[attr-defined]
    trainer.callbacks = [saving, *others]  # type: ignore[attr-defined]
    attach_exact(trainer, seed)
    trainer.strategy.checkpoint_io = VerifiedFiles(prefix="", keeps_objects=True, trusted=trust)
    lock = Lock(folder / LOCK)
    if trainer.is_global_zero and not lock.acquire(seconds=0.2):
        raise ConfigError(f"folder={folder}: another process trains there; wait for it, or choose another folder")
    try:
        found = newest_valid(
            folder / "checkpoints",
            print_warning,
            check=lambda path, state: check_guest_checkpoint(path, state, module=module, trainer=trainer),
        )
        path, rows = None, []
        if found is not None:
            path, rows = found[0], read_rows(folder)[: found[1]["num_rows"]]
        loggers = [logger for logger in trainer.loggers if not isinstance(logger, MetricsCSV)]
        trainer.loggers = [MetricsCSV(folder, rows=rows), *loggers]
        if data is not None and not isinstance(data, L.LightningDataModule):
            data = TrainingLoaders(data, module)
        trainer.precision_plugin.convert_module(module)  # Lightning does so only after loading a checkpoint, in float32
        seed_before_fit(seed)
        with signals.handling():
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        trainer.loggers[0].save()
    finally:
        lock.release()


class TrainingLoaders(L.LightningDataModule):
    """A data module of given training loaders, with the module's own loaders for validation and test."""

    def __init__(self, loaders: Any, module: L.LightningModule) -> None:
        super().__init__()
        self.loaders = loaders
        for hook in ("val_dataloader", "test_dataloader"):
            if is_overridden(module, hook, L.LightningModule):
                setattr(self, hook, getattr(module, hook))

    def train_dataloader(self) -> Any:
        return self.loaders
