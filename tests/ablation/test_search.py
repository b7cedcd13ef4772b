"""A search by Optuna that is killed and gone on with, and what W&B gets of an ablation."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from tests.ablation.test_sweep import SMALL, records, start
from tests.polling import wait_until
from tests.runs import wandb_file

from ablab.errors import ConfigError
from ablab.lab.ablation.search import search

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
    wait_until(lambda: len(records(tmp_path / "killed" / "search")) >= 2, launch)
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


REFUSED = [
    ("optimizer.lr=tag(log,interval(0,1))", "optimizer.lr=tag(log,interval(0,1)): Optuna cannot choose from it ("),
    ("optimizer.lr=interval(1,0.1)", "optimizer.lr=interval(1,0.1): Optuna cannot choose from it ("),
    ("seed=3,4", "seed=3,4: the runs of a search have one seed, or the luckiest would be found; give one, seed=3; "),
    ("folder=a,b", "folder=a,b: each run of a sweep has its own folder"),
]


@pytest.mark.parametrize(("word", "message"), REFUSED, ids=[word for word, _ in REFUSED])
def test_what_cannot_be_searched_is_refused(config: Callable[..., Any], word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        search(["norm=none,batchnorm", word], config(), Any, study="search", num_trials=1, seed=0)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)


def test_an_impossible_trial_fails_and_the_search_goes_on(command: Command, tmp_path: Path) -> None:
    words = ("-m", "hydra/sweeper=optuna", "norm=groupnorm", "norm.num_groups=3,4", *SMALL)
    result = command(*words, "hydra.sweeper.num_trials=4")
    assert result.returncode == 0, result.stderr
    assert "norm.num_groups=3: it cannot be: norm: " in result.stdout
    assert "best: norm.num_groups=4: val/accuracy" in result.stdout
    trials = (tmp_path / "runs" / "search" / "trials.csv").read_text()
    assert "fail" in trials
    more = command(*words, "norm.num_groups=3,4,8", "hydra.sweeper.num_trials=5")
    assert more.returncode == 2
    assert "error: norm.num_groups: the study search has been asked with other choices (" in more.stderr
    assert "or another study, hydra.sweeper.study=NAME" in more.stderr
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/runs/search/study.db")
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    study.ask()  # as an earlier launch left one that was killed before it had its values
    again = command(*words, "hydra.sweeper.num_trials=5")
    assert again.returncode == 0, again.stderr
    assert len(records(tmp_path / "runs" / "search")) == 1, "nothing was run with the defaults"


def test_a_search_of_which_nothing_can_be_run_says_so(command: Command) -> None:
    words = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.num_trials=2", "norm=groupnorm", "norm.num_groups=3,5")
    result = command(*words, *SMALL)
    assert result.returncode == 2
    assert "search: none of its trials could be run, for the reasons above; fix the command" in result.stderr


def test_a_search_without_validation_says_so(command: Command) -> None:
    words = ("-m", "hydra/sweeper=optuna", "hydra.sweeper.num_trials=1", "norm=none,batchnorm", *SMALL)
    result = command(*words, "trainer.check_val_every_n_epoch=5")
    assert result.returncode == 1
    assert "search: runs finished, but none has val/accuracy: there was no validation; trainer.limit" in result.stderr


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
    assert command("-m", "norm=batchnorm,none", "seed=0,1", "name=sweep_norm", *SMALL).returncode == 0
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
