"""The end of a run's first step, for `startup`; named on the command line, as any callback of a fork's."""

from __future__ import annotations

import os
import time
from typing import Any

from lightning.pytorch import Callback


class FirstStep(Callback):
    """Prints the clock after the first step of the optimizer, and leaves at once: what follows is not asked for."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        print(time.monotonic(), flush=True)
        os._exit(0)
