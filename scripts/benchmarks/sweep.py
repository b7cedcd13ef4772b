"""The overhead of a cell of a sweep beside its training, with runs executed serially in one process."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from ablab.data.reading import read_once
from ablab.lab.launch.local import run_logged
from benchmarks.measuring import Time, spread

CONF = Path(__file__).parents[2] / "conf"
LOGGERS = {"logger=csv": ("logger=csv",), "W&B offline": ("logger=wandb", "logger.wandb.mode=offline")}
CLOCK = "+callbacks.clock._target_=benchmarks.sweep.Clock"


class Clock(Callback):
    """Measures the time from the first batch of a training run to the end of its last batch."""

    seconds: ClassVar[float]  # of the last training run in this process

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == 0:
            self.began = time.perf_counter()

    def on_train_batch_end(self, *arguments: Any) -> None:
        Clock.seconds = time.perf_counter() - self.began


def sweep(rounds: int, device: torch.device) -> Iterator[Time]:
    """Measure cells of one epoch of the default network, seed by seed; everything except the steps counts."""
    trainer = "trainer=gpu" if device.type == "cuda" else "trainer=cpu"
    os.environ["WANDB_SILENT"] = "true"
    for name, logger in LOGGERS.items():
        seeds = iter(range(rounds + 1))

        def cell(logger: tuple[str, ...] = logger, seeds: Iterator[int] = seeds) -> float:
            with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(CONF), version_base="1.3"):
                words = [trainer, "trainer.max_epochs=1", *logger, CLOCK, f"seed={next(seeds)}", f"folder={folder}/run"]
                cfg = compose("train", words)
                began = time.perf_counter()
                status = run_logged(cfg)
                assert status == "finished", (Path(folder) / "run" / "log.txt").read_text(encoding="utf-8")
                return time.perf_counter() - began - Clock.seconds

        with read_once():  # as in `ablab.lab.ablation.sweep`
            measured = spread("a cell", f"beside its steps, {name}", cell, rounds)
        yield measured
