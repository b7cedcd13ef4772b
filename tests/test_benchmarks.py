"""The benchmarks of starts and of cells measure what they say; how fast it is, no test asks."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_run_and_the_script_by_hand_tell_the_time_after_their_first_step(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    began = time.monotonic()
    by_hand = command("--epochs", "0", script="scripts/benchmarks/by_hand.py")
    words = ["logger=csv", "+callbacks.first_step._target_=benchmarks.first_step.FirstStep"]
    run = command(*words, PYTHONPATH=f"{ROOT / 'scripts'}:{ROOT / 'src'}")
    for done in (by_hand, run):
        assert began < float(done.stdout.splitlines()[-1]) < time.monotonic(), done.stderr
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0"]
    [folder] = (tmp_path / "runs").iterdir()
    assert not (folder / "checkpoints").exists()  # it has left behind the first step


@pytest.mark.slow
def test_the_benchmark_of_a_sweep_times_cells_with_both_loggers() -> None:
    script = [sys.executable, "scripts/benchmark.py", "sweep", "--rounds", "1"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("a cell")]
    assert [" ".join(row[4:-2]) for row in rows] == ["steps, logger=csv", "steps, W&B offline"]
    assert all(float(row[-2]) > 0 for row in rows)
