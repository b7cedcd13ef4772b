"""The fault harness in a short form, and what signals mean (python scripts/faults.py is the long one)."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import forked
from tests.polling import LIMIT, wait_until, wait_until_caught

from ablab.errors import ABORTED, STOPPED

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "workers", "processes", "times"), [("rnn", 2, 1, 2), ("resnet", 0, 2, 1)])
def test_killed_runs_end_as_if_nothing_had_been(
    faults: Any, tmp_path: Path, model: str, workers: int, processes: int, times: int
) -> None:
    harness = faults.Harness(tmp_path, seed=3)
    words = faults.run_overrides(model, workers, processes)
    differs, done = harness.disturbed(words, "killed", harness.kill, times)
    assert differs == "", done
    assert done


@pytest.mark.slow
def test_runs_that_get_signals_end_as_if_nothing_had_been(faults: Any, tmp_path: Path) -> None:
    harness = faults.Harness(tmp_path, seed=0)
    words = faults.run_overrides("transformer", 0, 1)
    harness.reference(words)
    for name in faults.SIGNALS:
        differs, _ = harness.disturbed(words, name, harness.signal(name), 1)
        assert differs == ""


def start(tmp_path: Path, *words: str) -> forked.Popen:
    return forked.Popen(
        [sys.executable, str(ROOT / "train.py"), "logger=csv", "trainer.max_epochs=1000", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGTERM, signal.SIGINT),
        *(pytest.param(s, marks=pytest.mark.thorough) for s in (signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "trainer.limit_train_batches=5")
    wait_until(lambda: list(tmp_path.glob("runs/*/checkpoints/*.ckpt")), process)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == STOPPED, errors
    [run] = (tmp_path / "runs").iterdir()
    assert f"stopped by {number.name} after step " in printed
    assert f"go on with: python train.py resume=runs/{run.name}" in printed
    assert "Traceback" not in errors
    assert '"status": "stopped"' in (run / "run.json").read_text()


@pytest.mark.slow
def test_before_there_is_anything_to_save_a_signal_leaves_at_once(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_until_caught(process, signal.SIGUSR1)  # train.py's first lines; the imports take seconds
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=LIMIT)
    assert process.returncode == STOPPED
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "data.batch_size=full", "model.depth=110")  # steps of seconds
    wait_until(lambda: list(tmp_path.glob("runs/*/run.json")), process)

    def is_over() -> bool:
        process.send_signal(signal.SIGINT)
        return process.poll() is not None

    wait_until(is_over)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == ABORTED, errors
    assert "stopping after this step; Ctrl-C again leaves at once" in errors
