"""A search by Optuna that is killed and gone on with, and what W&B gets of an ablation."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.ablation.test_sweep import SMALL, records, start
from tests.runs import wandb_file

Command = Callable[..., subprocess.CompletedProcess[str]]
SEARCH = (
    *("-m", "hydra/sweeper=optuna", "hydra.sweeper.num_trials=4", "optimizer.lr=tag(log,interval(1e-3,1.0))"),
    *("norm=batchnorm,groupnorm", "data.batch_size=range(8,33,8)", *SMALL),
)


def test_a_search_that_is_killed_goes_on_and_finds_what_it_would_have_found(command: Command, tmp_path: Path) -> None:
    result = command(*SEARCH, "output_dir=whole")
    assert result.returncode == 0, result.stderr
    assert "best: optimizer.lr=" in result.stdout
    launch = start(tmp_path, *SEARCH, "output_dir=killed")
    until = time.monotonic() + 120
    while len(records(tmp_path / "killed" / "search")) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.killpg(launch.pid, signal.SIGKILL)
    launch.communicate()
    result = command(*SEARCH, "output_dir=killed")
    assert result.returncode == 0, result.stderr
    whole, killed = ((tmp_path / place / "search" / "trials.csv").read_text() for place in ("whole", "killed"))
    assert whole == killed
    assert whole.count("complete") == 4
    again = command(*SEARCH, "hydra.sweeper.num_trials=5", "output_dir=killed")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "killed" / "search" / "trials.csv").read_text().startswith(whole)
    assert len(records(tmp_path / "killed" / "search")) == 5


def test_a_search_over_nothing_is_refused(command: Command) -> None:
    result = command("-m", "hydra/sweeper=optuna", "norm=none")
    assert result.returncode == 2
    assert "nothing to search: give a key several values" in result.stderr


def test_a_wandb_sweep_has_the_grid_and_its_command_runs_one_cell(command: Command, tmp_path: Path) -> None:
    words = ("norm_batch_size", "norm=batchnorm,groupnorm", "data.batch_size=8,32", *SMALL[1:])
    result = command(*words, script="scripts/wandb_sweep.py")
    assert result.returncode == 0, result.stderr
    sweep: dict[str, Any] = yaml.safe_load(result.stdout)
    assert sweep["method"] == "grid"
    assert {name: len(one["values"]) for name, one in sweep["parameters"].items()} == {
        "norm": 2,
        "data.batch_size": 2,
        "seed": 5,
    }
    chosen = [f"{name}={one['values'][-1]}" for name, one in sweep["parameters"].items()]
    line = [*sweep["command"][3:-1], *chosen]
    result = command(*line, WANDB_SWEEP_ID="sweep123", WANDB_RUN_ID="abcd1234", WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    [(name, record)] = records(tmp_path / "runs" / "norm_batch_size").items()
    assert name.startswith("norm=groupnorm,batch_size=32,seed=4")
    assert record["id"] == "abcd1234"


@pytest.mark.slow
def test_a_report_is_logged_with_its_tables_and_files(command: Command, tmp_path: Path) -> None:
    assert command("-m", "norm=batchnorm,none", "seed=0,1", *SMALL).returncode == 0
    result = command("runs/sweep_norm", "--wandb", "ablab", script="scripts/report.py", WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    [file] = (tmp_path / "runs" / "sweep_norm" / "report").glob("wandb/offline-run-*/*.wandb")
    logged = {key for row in wandb_file.history(file) for key in row}
    assert {"runs", "cells", "comparisons"} <= {key.partition("/")[0] for key in logged}
    artifacts = [
        record.artifact for record in wandb_file.records(file) if record.WhichOneof("record_type") == "artifact"
    ]
    [report] = [artifact for artifact in artifacts if artifact.type == "report"]
    assert "report.html" in str(report.manifest)
    assert f"wandb sync {file.parent.relative_to(tmp_path)}" in result.stdout
