"""Jobs on a real Slurm: the batch script; a job that is stopped, goes back into the queue and goes on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.conftest import with_tests
from tests.polling import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
SMALL = ("trainer.max_epochs=2", "trainer.limit_train_batches=20", "trainer.log_every_n_steps=1", "logger=csv")
Slurm = Callable[..., str]
Wait = Callable[..., str]
Record = Callable[[Path], dict[str, Any]]


def submit(slurm: Slurm, place: Path, *words: str, more: tuple[str, ...] = (), **environment: str) -> str:
    """Submit the project's batch script as two tasks on two nodes; the job's number."""
    for name in ("train.py", "conf"):
        if not (place / name).exists():
            (place / name).symlink_to(ROOT / name)
    options = ("--parsable", "--nodes=2", "--ntasks-per-node=1", "--time=10", *more)
    return slurm("sbatch", *options, f"{ROOT}/scripts/slurm.sbatch", *SMALL, *words, cwd=place, **environment).strip()


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, wait: Wait, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("undisturbed")
    job = submit(slurm, place, TRAINER="ddp_cpu", RUN="run")
    assert wait(job, "COMPLETED", "FAILED") == "COMPLETED", (place / f"slurm-{job}.txt").read_text()
    return place / "run"


def test_two_tasks_are_one_run(undisturbed: Path, record: Record) -> None:
    assert record(undisturbed)["status"] == "finished"
    assert record(undisturbed)["batch_sizes"] == {"optimizer": 32, "forward": 16, "norm": 16}
    assert [path.name for path in undisturbed.parent.iterdir() if (path / "run.json").exists()] == ["run"]
    [log] = undisturbed.parent.glob("slurm-*.txt")
    assert log.read_text().count("best checkpoint by") == 1


def test_srun_and_the_runs_own_launcher_find_the_same(
    undisturbed: Path, command: Callable[..., subprocess.CompletedProcess[str]], record: Record, tmp_path: Path
) -> None:
    assert command("trainer=ddp_cpu", *SMALL, "folder=own", OMP_NUM_THREADS="1").returncode == 0
    assert record(tmp_path / "own")["weights_sha256"] == record(undisturbed)["weights_sha256"]
    assert (tmp_path / "own" / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()


def test_each_task_has_the_cores_that_its_job_asks_for(slurm: Slurm, wait: Wait, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text('import os; print("cores:", os.environ["SRUN_CPUS_PER_TASK"], flush=True)')
    job = submit(slurm, tmp_path, more=("--cpus-per-task=2",))
    assert wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert (tmp_path / f"slurm-{job}.txt").read_text().splitlines() == ["cores: 2"] * 2


def test_srun_by_hand_in_an_allocation_is_one_run(slurm: Slurm, record: Record, tmp_path: Path) -> None:
    """Its name is "interactive" there, by which Lightning would take each task for a run of its own."""
    words = ("trainer=ddp_cpu", "trainer.limit_train_batches=2", "trainer.max_epochs=1", "logger=csv", "folder=run")
    train = ("python", str(ROOT / "train.py"), *words)
    printed = slurm("salloc", "--nodes=1", "--ntasks-per-node=2", "srun", *train, cwd=tmp_path)
    assert printed.count("best checkpoint by") == 1
    assert record(tmp_path / "run")["processes"] == 2


def test_a_job_whose_time_is_nearly_over_goes_back_into_the_queue_and_on_to_the_same_bits(
    slurm: Slurm, wait: Wait, undisturbed: Path, record: Record, tmp_path: Path
) -> None:
    hold = "+callbacks.hold={_target_:tests.ablation.faulty.WaitsFor,name:go}"
    job = submit(slurm, tmp_path, hold, TRAINER="ddp_cpu", RUN="run", PYTHONPATH=with_tests(os.environ))
    rows = tmp_path / "run" / "metrics.csv"
    wait_until(lambda: len(list(tmp_path.glob("go.[0-9]*"))) == 2)
    slurm("scancel", "--signal=USR1", job)
    wait(job, "PENDING")
    assert record(tmp_path / "run")["status"] == "stopped"
    (tmp_path / "go.now").touch()
    time.sleep(3)  # Slurm takes no new start time in the first two seconds; later it would wait for two minutes
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")
    log = tmp_path / f"slurm-{job}.txt"
    assert wait(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert "the job goes back to the queue" in log.read_text()
    assert record(tmp_path / "run")["weights_sha256"] == record(undisturbed)["weights_sha256"]
    assert rows.read_text() == (undisturbed / "metrics.csv").read_text()


def test_a_task_that_fails_ends_the_job(slurm: Slurm, wait: Wait, record: Record, tmp_path: Path) -> None:
    fault = "+callbacks.fault={_target_:tests.ablation.faulty.RaisesWith,batch_norm:true,rank:1}"
    job = submit(slurm, tmp_path, fault, TRAINER="ddp_cpu", RUN="run", PYTHONPATH=with_tests(os.environ))
    assert wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert record(tmp_path / "run")["status"] == "failed"
    log = (tmp_path / f"slurm-{job}.txt").read_text()
    assert "error: process 1 of this run: RuntimeError: a bug in the second step" in log
    assert log.count("Traceback") == 1, log
