"""What a run costs until its first step, and how soon a command line is answered: whole processes, each a new one."""

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
# what is typed, and the exit code
ANSWERS = {
    "--help": (("--help",), 0),
    "--cfg job": (("--cfg", "job"), 0),
    "norm=grupnorm": (("norm=grupnorm",), 2),
    "optimizer.lrr=1": (("optimizer.lrr=1",), 2),
}
FLOORS = {"python -c pass": "pass", "import hydra": "import hydra"}


def startup(rounds: int, device: torch.device) -> Iterator[Ratio | Time]:
    """The default run against one written by hand, both to the end of their first step; and answers without a run."""
    trainer = "trainer=gpu" if device.type == "cuda" else "trainer=cpu"
    pairs = max(2, rounds // 2)
    ours, hand = partial(to_first_step, TRAIN, trainer, FIRST_STEP, "logger=csv"), partial(to_first_step, *by_hand())
    yield measure("first step", "a run, logger=csv", ours, "by hand", hand, pairs, warmup=1)
    wandb = partial(to_first_step, TRAIN, trainer, FIRST_STEP, *WANDB)
    yield measure("first step", "a run, W&B offline", wandb, "logger=csv", ours, pairs, warmup=1)
    for name, code in FLOORS.items():
        yield spread("floor", name, partial(to_the_end, "-c", code), rounds)
    for name, (words, answer) in ANSWERS.items():
        yield spread("answer", f"train.py {name}", partial(to_the_end, str(TRAIN), *words, code=answer), rounds)


def by_hand() -> tuple[Path, str, str]:
    return SCRIPTS / "benchmarks" / "by_hand.py", "--epochs", "0"


def to_first_step(script: Path, *words: str) -> float:
    """Seconds from a process's start to the time that it prints last, which is that after its first step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # W&B's own process may end a little later
        began = time.monotonic()
        printed = started(str(script), *words, folder=folder)
        return float(printed.splitlines()[-1]) - began


def to_the_end(*words: str, code: int = 0) -> float:
    """Seconds that a process takes."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        started(*words, folder=folder, code=code)
        return time.monotonic() - began


def started(*words: str, folder: str, code: int = 0) -> str:
    """What Python prints when it is given some words, in a folder."""
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
