"""The time to the first step of a run, and to answers of the command line, each in a new process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.measuring import Ratio, Time, measure, spread

SCRIPTS = Path(__file__).parents[1]
TRAIN = SCRIPTS.parent / "train.py"
FIRST_STEP = "+callbacks.first_step._target_=benchmarks.first_step.FirstStep"
WANDB = ("logger=wandb", "logger.wandb.mode=offline")
# the arguments, and the exit code
ANSWERS = {
    "--help": (("--help",), 0),
    "--cfg job": (("--cfg", "job"), 0),
    "norm=grupnorm": (("norm=grupnorm",), 2),
    "optimizer.lrr=1": (("optimizer.lrr=1",), 2),
}
FLOORS = {"python -c pass": "pass", "import hydra": "import hydra"}


def startup(rounds: int, device: torch.device) -> Iterator[Ratio | Time]:
    """Measure the default run against a hand-written one up to the first step, and commands without a run."""
    trainer = "trainer=gpu" if device.type == "cuda" else "trainer=cpu"
    pairs = max(2, rounds // 2)
    ours = partial(seconds_to_first_step, TRAIN, trainer, FIRST_STEP, "logger=csv")
    hand = partial(seconds_to_first_step, *by_hand())
    yield measure("first step", "a run, logger=csv", ours, "by hand", hand, pairs, warmup=1)
    wandb = partial(seconds_to_first_step, TRAIN, trainer, FIRST_STEP, *WANDB)
    yield measure("first step", "a run, W&B offline", wandb, "logger=csv", ours, pairs, warmup=1)
    for name, code in FLOORS.items():
        yield spread("floor", name, partial(seconds_to_exit, "-c", code), rounds)
    for name, (words, answer) in ANSWERS.items():
        yield spread("answer", f"train.py {name}", partial(seconds_to_exit, str(TRAIN), *words, code=answer), rounds)


def by_hand() -> tuple[Path, str, str]:
    return SCRIPTS / "benchmarks" / "by_hand.py", "--epochs", "0"


def seconds_to_first_step(script: Path, *words: str) -> float:
    """Return the seconds from the start of a process to the time that it prints after its first step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # W&B's own process may end later
        began = time.monotonic()
        printed = run_python(str(script), *words, folder=folder)
        return float(printed.splitlines()[-1]) - began


def seconds_to_exit(*words: str, code: int = 0) -> float:
    """Return the seconds that a process takes."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run_python(*words, folder=folder, code=code)
        return time.monotonic() - began


def run_python(*words: str, folder: str, code: int = 0) -> str:
    """Run Python with some arguments in a folder, and return its output."""
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert done.returncode == code, done.stderr
    return done.stdout
