"""hydra/launcher=slurm on a real Slurm: an ablation is one array, whatever fails, is cancelled or goes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import forked
from tests.cluster.conftest import with_tests
from tests.polling import LIMIT, wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
SWEEP = (
    *("-m", "hydra/launcher=slurm", "hydra.launcher.time=10", "name=sweep", "norm=batchnorm,groupnorm", "logger=csv"),
    *("trainer.limit_train_batches=10", "trainer.limit_test_batches=2", "trainer.log_every_n_steps=1"),
)
HELD = (
    *(*SWEEP, "seed=0", "trainer.max_epochs=2"),
    *("+callbacks.hold._target_=tests.ablation.faulty.WaitsFor", "+callbacks.hold.name=go"),
)
Slurm = Callable[..., str]
Start = Callable[..., forked.Popen]


@pytest.fixture
def start(slurm_environment: dict[str, str], slurm: Slurm, tmp_path: Path) -> Iterator[Start]:
    """Start the program where Slurm is; nothing of it is left when the test is over."""
    with contextlib.ExitStack() as stack:

        def begin(*words: str, **more: str) -> forked.Popen:
            process = forked.Popen(
                [sys.executable, str(ROOT / "train.py"), *words],
                cwd=tmp_path,
                env={**slurm_environment, "PYTHONPATH": with_tests(slurm_environment), **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield begin
    for array in arrays(tmp_path):
        slurm("scancel", f"--name={array}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the held sweep finds on this machine, without Slurm."""
    place = tmp_path_factory.mktemp("undisturbed")
    (place / "go.now").touch()
    words = [word for word in HELD if "launcher" not in word]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": with_tests(os.environ)}
    done = forked.run(ROOT / "train.py", words, folder=place, environment=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return outcomes(place)


def outcomes(place: Path) -> dict[str, Any]:
    """What must be equal to the bit, by the folders of the runs."""
    runs = {file.parent: json.loads(file.read_text()) for file in place.glob("runs/sweep/*/run.json")}
    return {
        folder.name: (record["status"], record["weights_sha256"], (folder / "metrics.csv").read_text())
        for folder, record in runs.items()
    }


def arrays(place: Path) -> list[str]:
    """The arrays that a sweep has submitted."""
    return [file.stem for file in place.glob("runs/sweep/slurm/*.tsv")]


def until_they_train(place: Path, number: int) -> None:
    """Wait until some runs train; they go on once there is a file `go.now`, or a signal comes."""
    wait_until(lambda: len(list(place.glob("go.[0-9]*"))) >= number)


@pytest.mark.thorough
def test_a_cell_of_two_processes_that_fails_disturbs_no_other(
    start: Start, slurm: Slurm, state: Callable[[str], str], tmp_path: Path
) -> None:
    fault = "+callbacks.fault={_target_:tests.ablation.faulty.RaisesWith,batch_norm:true,rank:1}"
    words = (*SWEEP, "trainer=ddp_cpu", "trainer.max_epochs=1", "seed=0", "hydra.launcher.at_once=2", fault)
    sweep = start(*words)
    printed, _ = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 1, printed
    assert "error: 1 of 2 runs failed; the same command tries them again, and them alone" in printed
    assert printed.count("RuntimeError: a bug in the second step\n    see ") == 1
    assert "1 of 2 runs finished" in printed
    [array] = arrays(tmp_path)
    states = {}
    shown = slurm("squeue", f"--name={array}", "--states=all", "--noheader", "--array", "--format=%K %T")
    for line in shown.splitlines():
        index, found = line.split()
        states[int(index)] = found
    commands = (tmp_path / f"runs/sweep/slurm/{array}.tsv").read_text().splitlines()
    for index, line in enumerate(commands):
        folder = Path(line.partition("\t")[0])
        failed = "norm=batchnorm" in folder.name
        assert states[index] == ("FAILED" if failed else "COMPLETED")
        record = json.loads((folder / "run.json").read_text())
        assert (record["status"] == "finished") != failed
        assert record["batch_sizes"]["forward"] == 16


def test_a_cancelled_array_is_completed_by_the_same_command(
    start: Start, slurm: Slurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    sweep = start(*HELD)
    until_they_train(tmp_path, 1)
    [array] = arrays(tmp_path)
    slurm("scancel", f"--name={array}")
    printed, _ = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 1, printed
    assert "of 2 runs failed; the same command tries them again" in printed
    assert "back to the queue" not in "".join(file.read_text() for file in tmp_path.glob("runs/sweep/*/log.txt"))
    (tmp_path / "go.now").touch()
    again = start(*HELD)
    printed, _ = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, printed
    assert len(arrays(tmp_path)) == 2
    assert outcomes(tmp_path) == undisturbed


def test_a_preempted_cell_goes_on_and_an_ended_watcher_is_replaced(
    start: Start, slurm: Slurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    sweep = start(*HELD)
    until_they_train(tmp_path, 2)
    sweep.send_signal(signal.SIGTERM)
    printed, _ = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 75, printed
    assert "the jobs go on: the same command follows them" in printed
    [array] = arrays(tmp_path)
    shown = slurm("squeue", f"--name={array}", "--noheader", "--array", "--format=%i")
    jobs = sorted(shown.split())
    assert len(jobs) == 2
    slurm("scancel", "--signal=USR1", jobs[0])  # whose number as a job is that of the whole array
    watcher = start(*HELD)
    log = next(tmp_path.glob("runs/sweep/norm=batchnorm*/log.txt"))
    wait_until(lambda: "the job goes back to the queue" in log.read_text())
    wait_until(lambda: "in Slurm's queue" in watcher.text_of(1), watcher)
    assert f"runs ({array})" in watcher.text_of(1)
    (tmp_path / "go.now").touch()
    slurm("scontrol", "update", f"jobid={jobs[0]}", "starttime=now")  # it would wait there for two minutes
    printed, _ = watcher.communicate(timeout=LIMIT)
    assert watcher.returncode == 0, printed
    assert arrays(tmp_path) == [array]
    assert outcomes(tmp_path) == undisturbed
    records = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("runs/sweep/*/run.json"))]
    assert ["resumed" in record for record in records] == [True, False]  # the other element was left alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+hydra.launcher.options.partition=nowhere"],
            "error: hydra.launcher: sbatch refuses the jobs: invalid partition specified: nowhere",
        ),
        (["trainer=gpu"], "error: hydra.launcher: sbatch refuses the jobs: Invalid generic resource"),
        (["trainer=ddp"], "error: trainer.devices=auto: Slurm has to be told how many; give a number (norm=batchnorm)"),
    ],
)
def test_what_slurm_cannot_do_is_said(words: list[str], message: str, start: Start, tmp_path: Path) -> None:
    sweep = start(*HELD, *words)
    printed, _ = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 2
    assert message in printed
    assert not list(tmp_path.glob("runs/sweep/slurm/*"))
