"""A callback that makes one process of a run fail once; scripts/faults.py adds it to a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

import lightning as L


class RankFault(L.Callback):
    """Makes one process raise, be killed or hang.

    Args:
        rank: of the process.
        step: fail before this step.
        how: "raise", or the signal to send.
        once: a file that marks that the failure has happened.
    """

    def __init__(self, *, rank: int, step: int, how: Literal["raise", "SIGKILL", "SIGSTOP"], once: str) -> None:
        self.rank = rank
        self.step = step
        self.how = how
        self.once = Path(once)

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self.once.exists():
            self.once.touch()
            if self.how == "raise":
                raise RuntimeError(f"a bug in process {self.rank}")
            os.kill(os.getpid(), signal.Signals[self.how])
