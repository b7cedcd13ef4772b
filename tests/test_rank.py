"""Which process of a run this is: torchrun, srun and the run's own starter say so, and nothing else does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ablab import rank as ranks
from ablab.errors import ConfigError

Command = Callable[..., subprocess.CompletedProcess[str]]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ranks.SINGLE_PROCESS_VALUES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"LOCAL_RANK": "1"},
        {"NODE_RANK": "2"},
        {"GROUP_RANK": "2"},
        {"SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
        {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "1"},
        {"JSM_NAMESPACE_RANK": "1"},
        {"PMI_RANK": "1", "PMI_SIZE": "2"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        {"WORLD_SIZE": "8"},
        {"RANK": "not a number"},
        {"TORCHELASTIC_RUN_ID": "left over", "RANK": "1"},
    ],
)
def test_left_over_variables_are_named_and_make_no_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str]
) -> None:
    set_all(monkeypatch, variables)
    assert (ranks.rank(), ranks.is_local_rank_zero()) == (0, True)
    ranks.remove_stale_rank_variables()
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert said.count("\n") == 1
    for name, value in variables.items():
        if name in ranks.SINGLE_PROCESS_VALUES:
            assert name not in os.environ
            assert f"{name}={value}" in said
    ranks.remove_stale_rank_variables()
    assert capsys.readouterr().err == ""


def test_variables_that_change_nothing_are_not_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch script of Slurm has a rank of 0; LOCAL_RANK=0 would keep Lightning from starting processes."""
    set_all(monkeypatch, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    ranks.remove_stale_rank_variables()
    assert capsys.readouterr().err == ""
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("variables", "launcher", "rank", "first"),
    [
        (TORCHRUN, "torchrun", 3, False),
        (SRUN, "srun", 3, False),
        ({**SRUN, **TORCHRUN, "RANK": "2", "LOCAL_RANK": "0"}, "torchrun", 2, True),
    ],
)
def test_launchers_number_their_processes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    launcher: str | None,
    rank: int,
    first: bool,
) -> None:
    set_all(monkeypatch, variables)
    ranks.remove_stale_rank_variables()
    assert variables.items() <= os.environ.items()
    assert (ranks.launcher(), ranks.rank(), ranks.is_local_rank_zero()) == (launcher, rank, first)
    assert capsys.readouterr().err == ""


def test_a_run_in_a_notebook_records_itself_whatever_lightning_was_imported_with(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    set_all(monkeypatch, {"LOCAL_RANK": "1"})
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    done = run()
    assert (done.folder / "metrics.csv").exists()
    assert "best checkpoint by" in done.printed


def test_one_process_of_several_that_torchrun_has_not_started_is_refused(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], tmp_path: Path
) -> None:
    """As an operator of Kubernetes sets the variables of each pod: alone, every pod would train the whole model."""
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"})
    command = r"torchrun --nnodes=2 --node-rank=0 --master-addr=pod-0 --master-port=23456 train\.py"
    with pytest.raises(ConfigError, match=rf"RANK=0, WORLD_SIZE=2, MASTER_ADDR=pod-0: .*{command}.*unset RANK"):
        run()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("variable", ["RANK=1", "LOCAL_RANK=1", "SLURM_PROCID=2", "JSM_NAMESPACE_RANK=1"])
def test_a_program_with_a_left_over_rank_says_what_is_wrong(command: Command, variable: str) -> None:
    name, _, value = variable.partition("=")
    done = command("nomr=batchnorm", **{name: value})
    assert done.returncode == 2
    assert f"warning: {variable}: ignored" in done.stderr
    assert "error: nomr: there is no such key; did you mean norm?" in done.stderr


def test_a_sweep_with_a_left_over_rank_records_each_run(command: Command, tmp_path: Path) -> None:
    words = ("-m", "seed=0,1", "trainer=smoke", "logger=csv", "hydra.launcher.num_processes=2")
    done = command(*words, RANK="1", LOCAL_RANK="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: RANK=1, LOCAL_RANK=1: ignored") == 1
    assert len(list(tmp_path.glob("runs/*/*/metrics.csv"))) == 2
