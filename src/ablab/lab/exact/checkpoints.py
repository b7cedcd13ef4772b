"""Save checkpoints at moments from which a run can resume to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from ablab.errors import RunError, Stopped
from ablab.lab.run import checkpoint_files, signals
from ablab.lab.run.checkpoint_files import BEST
from ablab.lab.run.folder import read_record
from ablab.tasks.all_reduce import StepAllReduce, any_rank
from ablab.tasks.task import Task


class Checkpoints(L.Callback):
    """Saves checkpoints of the training, and the weights of the best model.

    A checkpoint is saved before each validation, at intervals, when the run is asked to stop, and at the end; always
    between two steps, where resuming is exact. The weights of the best model are saved after the validation that finds
    them.

    This is the first callback of a run, so that hooks of other callbacks at the start of a step also run after a
    resume.

    Args:
        monitor: the validation metric that selects the best model; None selects none.
        mode: "max" if higher is better, else "min".
        keep: how many of the newest checkpoints are kept.
        every_n_minutes: the longest time between two checkpoints.
        every_n_steps: the steps between two checkpoints; None saves for the other reasons only.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        monitor: str | None,
        mode: Literal["min", "max"],
        keep: int = 2,
        every_n_minutes: float = 10.0,
        every_n_steps: int | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: a run that is to be resumed needs at least one")
        if every_n_minutes <= 0:
            raise ValueError(f"every_n_minutes={every_n_minutes}: more than 0 is needed")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: at least 1 is needed, or null")
        self.monitor = monitor
        self.mode = mode
        self.keep = keep
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self.best_score: float | None = None
        self.saved: tuple[int, str] | None = None
        self.saved_at = 0.0
        self.phase = ""
        self.common_batches = math.inf
        self.folder = Path()
        self.step_all_reduce = StepAllReduce()
        self.num_logged_steps: int | None = None  # of a resumed run, until its first step; see `on_load_checkpoint`

    # When ---------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.loggers[0].save_dir or ".") / "checkpoints"
        self.saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_all_reduce = pl_module.step_all_reduce if isinstance(pl_module, Task) else StepAllReduce()
        self.step_all_reduce.flags = {"stop": is_stop_requested, "save": self.is_save_due}
        signals.restore()  # Lightning has installed its own
        if trainer.is_global_zero:
            self.remove_leftovers()
        if self.best_score is not None and not (self.folder / BEST).exists():
            raise RunError(
                f"{self.folder / BEST}: it is not there, and has the weights that validation has chosen so far "
                f"({self.monitor} {self.best_score:.4f}); bring it back, or begin a new run"
            )
        if self.best_score is not None:  # a broken file must fail here, not after the training of a resumed run
            checkpoint_files.read_weights(self.folder / BEST, like=network(pl_module).state_dict())

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        total.ready = total.started + 1  # Lightning would count the batch at which a run resumes twice
        if self.num_logged_steps is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.num_logged_steps
            self.num_logged_steps = None
        if trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.accumulate_grad_batches:
            return  # checkpoints do not hold accumulated gradients
        step = trainer.global_step
        flags = reduced_flags(self.step_all_reduce, pl_module)
        due = flags["save"]
        due |= self.every_n_steps is not None and step % self.every_n_steps == 0
        # when resuming at max_steps, Lightning skips the validation after the last step, so save before it
        due |= step == trainer.max_steps - 1
        if flags["stop"] or (due and step > 0):
            self.save(trainer, "training")
        if flags["stop"]:
            raise_stopped(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.common_batches = self.min_num_batches(trainer, trainer.num_val_batches)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            progress.ready = progress.started = progress.processed = progress.completed  # type: ignore[attr-defined]
            if trainer.global_step != trainer.max_steps and not is_accumulating(trainer):
                self.save(trainer, "validation")

    def on_validation_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.stop_if_requested(trainer, batch_idx=arguments[3])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise RunError(
                f"monitor.metric={self.monitor}: the validation did not log it, but {logged}; set monitor.metric to a "
                f"metric that is logged, or have validation_step call self.log({self.monitor!r}, …)"
            )
        score = float(trainer.callback_metrics[self.monitor])
        if math.isnan(score):
            return
        if self.best_score is None or (score > self.best_score if self.mode == "max" else score < self.best_score):
            self.best_score = score
            trainer.save_checkpoint(self.folder / BEST)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, "end")
        self.stop_if_requested(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.common_batches = self.min_num_batches(trainer, trainer.num_test_batches)
        signals.restore()

    def on_test_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.stop_if_requested(trainer, batch_idx=arguments[3])

    # How ----------------------------------------------------------------------------------------------------------

    def min_num_batches(self, trainer: L.Trainer, num_batches: Sequence[float]) -> float:
        """Return the smallest number of evaluation batches of any process; some may have one more."""
        here = torch.tensor(sum(num_batches), device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(here, reduce_op="min")) if trainer.world_size > 1 else float(here)

    def is_save_due(self) -> bool:
        return time.monotonic() - self.saved_at > 60 * self.every_n_minutes

    def stop_if_requested(self, trainer: L.Trainer, batch_idx: int = 0) -> None:
        """Leave an evaluation, which starts again after a resume."""
        if batch_idx >= self.common_batches:
            return
        if any_rank(is_stop_requested(), trainer.strategy.root_device):
            raise_stopped(trainer)

    def save(self, trainer: L.Trainer, phase: str) -> None:
        """Save a checkpoint, unless this position has just been saved or loaded."""
        here = (trainer.global_step, phase)
        if self.saved == here:
            return
        self.phase = phase
        trainer.save_checkpoint(self.folder / checkpoint_files.checkpoint_name(*here))
        self.saved, self.saved_at = here, time.monotonic()
        if trainer.is_global_zero:
            for old in checkpoint_files.list_checkpoints(self.folder)[: -self.keep]:
                if not old.is_dir():
                    old.unlink()

    def remove_leftovers(self) -> None:
        """Remove partial files of a killed process, and rename broken checkpoints that were not resumed from.

        The run will write these steps again.
        """
        for path in self.folder.glob("*.tmp"):
            path.unlink()
        here = (
            None
            if self.saved is None
            else checkpoint_files.step_and_phase(Path(checkpoint_files.checkpoint_name(*self.saved)))
        )
        for path in checkpoint_files.list_checkpoints(self.folder):
            if here is None or checkpoint_files.step_and_phase(path) > here:
                broken = path.with_suffix(".broken")
                if broken.is_dir():  # a file cannot replace a folder
                    broken = path.with_name(f"{path.name}.broken")
                path.rename(broken)

    # What ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "phase": self.phase}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        self.phase = state_dict["phase"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        logger: Any = trainer.loggers[0]
        checkpoint["num_rows"] = logger.sync()  # rows of metrics.csv that a resumed run keeps
        if (self.folder.parent / "run.json").exists():
            checkpoint["run"] = read_record(self.folder.parent)["id"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct Lightning's progress counters for the position of the checkpoint.

        Lightning assumes that a checkpoint is one of its own, which are saved at other moments.
        """
        phase = checkpoint["callbacks"][self.state_key]["phase"]
        self.saved = (checkpoint["global_step"], phase)
        loops = checkpoint["loops"]["fit_loop"]
        if phase == "validation":  # otherwise Lightning would skip a validation that has not started
            total = loops["epoch_loop.val_loop.batch_progress"]["total"]
            total["ready"] += 1
            total["started"] += 1
        if phase == "training":  # otherwise Lightning may count the last logged step twice
            self.num_logged_steps = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
        if phase == "end":  # for any reason
            trainer.should_stop = True


class WithoutCheckpoints(L.Callback):
    """The callback of runs without checkpoints: when asked to stop, a run stops between two steps, saving nothing."""

    def __init__(self) -> None:
        self.step_all_reduce = StepAllReduce()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step_all_reduce = pl_module.step_all_reduce if isinstance(pl_module, Task) else StepAllReduce()
        self.step_all_reduce.flags = {"stop": is_stop_requested}
        signals.restore()  # Lightning has installed its own

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        if reduced_flags(self.step_all_reduce, pl_module)["stop"]:
            raise_stopped(trainer)


def network(module: L.LightningModule) -> nn.Module:
    """Return the network whose weights a run keeps: the model of a task, or an external LightningModule itself."""
    model: Any = module.model if isinstance(module, Task) else module
    return model


def reduced_flags(all_reduce: StepAllReduce, module: L.LightningModule) -> dict[str, bool]:
    """Return the flags raised stop and save flags; for a module without its own all-reduce, in modules do so here."""
    if isinstance(module, Task):
        return all_reduce.reduced_flags()
    nothing = torch.zeros((), device=module.device)
    all_reduce.end(nothing)
    flags = all_reduce.reduced_flags()
    all_reduce.begin(nothing)
    return flags


def is_accumulating(trainer: L.Trainer) -> bool:
    """Return whether the gradients of a batch wait for those of later batches."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    is_between = progress.current.completed % trainer.accumulate_grad_batches != 0
    return is_between and not progress.is_last_batch  # the last batch always takes a step


def is_stop_requested() -> bool:
    """Return whether this process has been asked to stop."""
    return signals.requested is not None


def raise_stopped(trainer: L.Trainer) -> None:
    """Stop the run by raising `Stopped`."""
    name = signals.requested.name if signals.requested else "a signal to another process"
    raise Stopped(f"{name} after step {trainer.global_step}")
