"""A run's folder on file systems that lack something, and one that goes away."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ablab import disk
from ablab.disk import Lock, is_locked, write_text
from ablab.errors import ConfigError, RunError
from ablab.tasks.task import Task

Start = Callable[..., Any]
LONG = (
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=2"),
    *("trainer.limit_test_batches=1", "trainer.log_every_n_steps=1"),
)


def refuse_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP", "EBADF", "EACCES", "ENOSYS"])
def test_a_file_system_that_does_not_sync_folders_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refuse_folders(monkeypatch, getattr(errno, name))
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_an_error_of_the_disk_is_one_of_a_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    refuse_folders(monkeypatch, getattr(errno, name))
    with pytest.raises(RunError, match="could not be written"):
        write_text(tmp_path / "file", "text")


def test_a_run_needs_no_sync_of_folders(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_folders(monkeypatch, errno.EINVAL)
    assert '"status": "finished"' in (run().folder / "run.json").read_text()


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_run_goes_on_where_there_are_no_locks_and_says_so(
    run: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """Also where a killed process on another machine has left something in the lock's file."""
    without_locks(monkeypatch, getattr(errno, name))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("99999\nnode17\n1\n")
    assert run(f"folder={tmp_path}/run").metrics
    said = capsys.readouterr().err
    assert said.count(f"warning: {tmp_path}/run: its file system has no file locks (flock)") == 1
    assert not is_locked(tmp_path / "run" / ".lock")


def test_a_folder_that_takes_no_files_is_not_left_behind(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(lock: Lock, seconds: float = 0) -> bool:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Lock, "acquire", refuse)
    with pytest.raises(ConfigError, match=r"nothing can be written there \(Read-only file system\)"):
        run()
    assert list((tmp_path / "runs").iterdir()) == []


def after_steps(monkeypatch: pytest.MonkeyPatch, k: int, act: Callable[[], Any]) -> None:
    """Do something in a run's k-th training step."""
    passed, original = 0, Task.training_step

    def step(self: Task, *arguments: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == k:
            act()
        return original(self, *arguments)

    monkeypatch.setattr(Task, "training_step", step)


@pytest.mark.parametrize("way", ["deleted", "moved", "with its parent"])
def test_a_run_whose_folder_goes_away_writes_nothing_anew(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    folder = tmp_path / "results" / "run"
    ways = {
        "deleted": lambda: shutil.rmtree(folder),
        "moved": lambda: folder.rename(tmp_path / "elsewhere"),
        "with its parent": lambda: shutil.rmtree(folder.parent),
    }
    with monkeypatch.context() as patch:
        after_steps(patch, 4, ways[way])
        with pytest.raises(RunError, match="the run's folder is gone, deleted or moved"):
            run(*LONG, f"folder={folder}")
    assert not folder.exists()
    assert f"warning: {folder}" not in capsys.readouterr().err
    assert run(*LONG, f"folder={folder}").metrics


def test_metrics_that_are_deleted_are_written_again(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = run(*LONG, f"folder={tmp_path}/undisturbed").folder
    after_steps(monkeypatch, 5, (tmp_path / "run" / "metrics.csv").unlink)
    folder = run(*LONG, f"folder={tmp_path}/run").folder
    assert (folder / "metrics.csv").read_text() == (undisturbed / "metrics.csv").read_text()
    assert "metrics.csv: it was deleted, and is written again with all rows" in capsys.readouterr().err


def test_checkpoints_that_are_deleted_are_one_message_at_most(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run goes on and saves again; only the weights that validation had chosen cannot come back."""
    after_steps(monkeypatch, 5, lambda: shutil.rmtree(tmp_path / "run" / "checkpoints"))
    run(*LONG, f"folder={tmp_path}/run")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_too_few_open_files_are_one_message_with_the_remedy(tmp_path: Path) -> None:
    error = disk.write_error(tmp_path / "run.json", OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    assert "could not be written (Too many open files); allow more open files (ulimit -n 4096)" in str(error)


def test_a_program_in_a_folder_that_is_gone_says_so(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "gone.py").write_text(
        f"import os, runpy\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')\n"
        f"runpy.run_path({str(Path(__file__).parents[2] / 'train.py')!r}, run_name='__main__')\n"
    )
    done = command("trainer=smoke", script=str(tmp_path / "gone.py"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: the folder in which this program was started is gone (No such file or directory)" in done.stderr
