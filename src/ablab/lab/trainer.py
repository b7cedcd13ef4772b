"""Lightning's trainer with options for compilation, memory layout and profiling."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from ablab.callbacks.profile import Profile
from ablab.tasks.task import TaskHooks

TESTED_VERSIONS = "2.6."  # versions of Lightning whose training step `ablab.lab.fast_loop` replicates
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Trainer(LightningTrainer):
    """Lightning's trainer with options for how a step is executed.

    Args:
        compile: the mode of `torch.compile` for the forward and backward pass; "reduce-overhead" and "max-autotune"
            replay them as CUDA graphs. None runs in eager mode.
        channels_last: keep images as N, H, W, C in memory, which speeds up convolutions on GPUs.
        profile: report where the time of a step goes, see `ablab.callbacks.profile`.
        max_restarts: times that all DDP workers are restarted from the newest checkpoint after one of them has failed.
        callbacks: the callbacks of the run.
        settings: passed to Lightning's trainer.
    """

    def __init__(
        self,
        *,
        compile: Mode | None = None,
        channels_last: bool = False,
        profile: bool = False,
        max_restarts: int = 0,
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> None:
        # with deterministic=true torch fills every new tensor, 230 per step of the default network, to catch reads of
        # uninitialized memory
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.profile = Profile() if profile else None
        # a task adds its hooks itself under other trainers, but a subclass may override `configure_callbacks`
        callbacks = [*callbacks, TaskHooks(), *([self.profile] if self.profile else [])]
        super().__init__(callbacks=callbacks, **{"profiler": NoProfiler(), **settings})
        if lightning.__version__.startswith(TESTED_VERSIONS):
            from ablab.lab.fast_loop import TrainingEpoch  # uses private parts of Lightning 2.6

            self.fit_loop.epoch_loop = TrainingEpoch(self, min_steps=self.min_steps, max_steps=self.max_steps)
        else:
            rank_zero_warn(
                f"Lightning {lightning.__version__}: the faster training loop is tested with {TESTED_VERSIONS}x only, "
                "so Lightning's own is used; a step of a small network takes a tenth longer"
            )
        self.max_restarts = max_restarts
        self.compile = compile
        self.channels_last = channels_last

    @property
    def logger(self) -> Logger | None:
        """The logger that callbacks and modules use: the first tracker, or metrics.csv if there is none."""
        return next(iter([*self.loggers[1:], *self.loggers]), None)

    @logger.setter
    def logger(self, logger: Logger | None) -> None:
        self.loggers = [] if logger is None else [logger]

    def prepare(self, model: nn.Module) -> None:
        """Compile the model and set its memory format as configured; parameters and their names stay the same."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile is not None:
            model.compile(mode=self.compile, dynamic=False)


class NoProfiler(PassThroughProfiler):
    """A profiler without overhead: Lightning's default creates a context for each of the fifty hooks of a step."""

    nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return self.nothing
