"""Runs that were killed, and runs whose files are damaged: the reason is said, and no other run is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ablation.test_report import RECORD, ablation

from ablab.errors import ConfigError
from ablab.lab.ablation.report import compose_report
from ablab.lab.ablation.results import failure_summary, read_results, status_of
from ablab.lab.run.folder import describe_exit, failure_reason

ROOT = Path(__file__).parents[2]
assert ablation  # a fixture

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\n'


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("", ""),
        ("run: runs/x\nEpoch 3:  40%|####      | 4/10\n", ""),
        ("run: runs/x\nUserWarning: few workers\n  warnings.warn(\n", ""),
        ("run: runs/x\nerror: no room\n", "no room"),
        ("run: runs/x\nerror: no room\n  for a file\n", "no room"),
        (
            "run: runs/x\nerror: 0.3 in this step\nEpoch 3\n" + TRACE + "ValueError: too large\nand more\n",
            "ValueError: too large",
        ),
        (TRACE + "KeyError: 'a'\n\nDuring handling of it:\n\n" + TRACE + "mylab.Bad: no\n", "mylab.Bad: no"),
        ("run: runs/x\nerror: of the first try\nrun: runs/x\nEpoch 1\n", ""),
        ("run: runs/x\nsrun: error: node: task 0: Exited with exit code 1\n", ""),
        ("run: x\nslurmstepd: error: Detected 1 oom_kill event in StepId=1.0\n", "killed by Slurm: out of memory"),
        (
            "run: x\nslurmstepd: error: *** STEP 1.0 ON n CANCELLED AT 2026 DUE TO TIME LIMIT ***\n",
            "ended by Slurm: its time was over",
        ),
        ("run: x\nsrun: error: node: task 0: Killed\n", "killed by SIGKILL (often out of memory)"),
    ],
)
def test_the_reason_of_a_failure_is_no_progress_bar_and_no_warning(tmp_path: Path, log: str, why: str) -> None:
    (tmp_path / "log.txt").write_text(log)
    assert failure_reason(tmp_path) == why


def test_the_record_of_a_failure_is_believed_before_its_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("run: runs/x\nerror: 0.3 in this step\nEpoch 1\n")
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, "status": "failed", "error": "RuntimeError: a bug\nmore"}))
    assert failure_summary(tmp_path) == "RuntimeError: a bug"
    with (tmp_path / "log.txt").open("a") as log:
        log.write("error: the data are not those of the run\n")
    assert failure_summary(tmp_path) == "the data are not those of the run", "a newer try, which got no further"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (-9, "killed by SIGKILL (often out of memory)"),
        (-7, "killed by SIGBUS (often a full /dev/shm)"),
        (-11, "killed by SIGSEGV"),
        (-63, "killed by signal 63"),
        (3, "its process ended with exit code 3 and without a message"),
    ],
)
def test_a_death_is_told_by_the_exit_code(code: int, why: str) -> None:
    assert describe_exit(code) == why


def test_a_process_that_left_no_word_is_said_to_have_left_none(tmp_path: Path) -> None:
    assert (status_of(tmp_path), failure_summary(tmp_path)) == ("missing", "not begun")
    (tmp_path / "log.txt").write_text("Epoch 3:  40%|####\n")
    assert (status_of(tmp_path), failure_summary(tmp_path)) == ("failed", "its process ended without a message")
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, "status": "running"}))
    assert (status_of(tmp_path), failure_summary(tmp_path)) == ("stopped", "its process ended without a message")
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, "status": "stopped", "error": "Stopped: SIGTERM"}))
    assert (status_of(tmp_path), failure_summary(tmp_path)) == ("stopped", "stopped")


def test_a_worker_that_is_killed_is_named_with_its_signal(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    words = ("-m", "+callbacks.bug._target_=tests.ablation.faulty.IsKilled", "norm=none", "seed=0,1", "name=killed")
    words += ("trainer=smoke", "logger=csv", "hydra.launcher.num_processes=2")
    result = command(*words, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "src")]))
    assert result.returncode == 1
    assert "  seed=0: killed by SIGKILL (often out of memory)\n" in result.stderr
    assert "  seed=1: killed by SIGKILL (often out of memory)\n" in result.stderr


DAMAGES: dict[str, tuple[str, Any]] = {
    "a metric of 400 digits": ("run.json", {"metrics": {"test/accuracy": 10**400}}),
    "a metric that is a word": ("run.json", {"metrics": {"test/accuracy": "high"}}),
    "metrics that are a list": ("run.json", {"metrics": [1]}),
    "no metrics": ("run.json", {}),
    "a strange status": ("run.json", {"status": 5}),
    "a record that is a list": ("run.json", "[]"),
    "a cut off record": ("run.json", '{"id": "x'),
    "an endless record": ("run.json", "[" * 100_000),
    "curves of bytes": ("metrics.csv", b"\x00\xff\n"),
    "curves of words": ("metrics.csv", b"step,epoch,val/loss\n1,0,high\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_takes_no_other_from_the_report(ablation: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(ablation, tmp_path / "two"))
    file, content = DAMAGES[damage]
    if isinstance(content, dict):
        content = json.dumps({**RECORD, **content})
    (folder / "none" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_results(folder)
    assert list(found.runs["status"]) == ["finished", "failed"]
    report = compose_report(found)
    assert report.facts[0] == "1 of 2 runs finished: 2 of norm × 1 seeds."
    [trouble] = report.troubles
    assert trouble.startswith("norm none, seed 0: ")
    assert file in trouble or "damaged" in trouble


@pytest.mark.parametrize(
    ("value", "counted"), [("null", "1 without a value"), ("NaN", "1 failed"), ("Infinity", "1 failed")]
)
def test_a_metric_without_a_value_in_one_run_is_counted(
    ablation: Path, tmp_path: Path, value: str, counted: str
) -> None:
    """A run writes null for a number that is not finite; JSON has no other, so that such a record is damaged."""
    folder = Path(shutil.copytree(ablation, tmp_path / "two"))
    record = json.dumps({**RECORD, "metrics": {"test/accuracy": 0.0}}).replace("0.0}", f"{value}}}")
    (folder / "none" / "run.json").write_text(record)
    report = compose_report(read_results(folder))
    assert report.tables[-1].rows[1] == ["norm none", counted]


def test_runs_that_the_report_is_not_about_are_counted(ablation: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ablation, tmp_path / "two"))
    shutil.copytree(folder / "none", folder / "norm=frn,seed=0_12345678")
    note = "1 more run in this folder is not in this report: other levels, seeds, settings or code."
    assert read_results(folder).notes == [note]


def test_cells_that_need_different_modules_are_no_mix_of_code(ablation: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ablation, tmp_path / "two"))

    def sources(run: str, **files: str) -> None:
        record = json.loads((folder / run / "run.json").read_text())
        parts = [{"path": path.replace("__", "/") + ".py", "sha256": found} for path, found in files.items()]
        record |= {
            "sources": [{"path": "ablab", "sha256": "a"}, *parts],
            "identity": {**record["identity"], "code": run},
        }
        (folder / run / "run.json").write_text(json.dumps(record))

    sources("batchnorm", mylab__batch="b")
    sources("none")
    assert read_results(folder).notes == []
    sources("none", mylab__batch="c")
    with pytest.raises(ConfigError, match=r"made by different code: mylab/batch\.py: 1 by b"):
        read_results(folder)
