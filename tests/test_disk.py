"""Locks between processes, and what file systems without them get."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from ablab.data.cache import content_key, get_or_create
from ablab.disk import Lock, is_locked


def test_one_process_has_a_lock(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert not is_locked(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind
    assert first.acquire()
    assert is_locked(tmp_path / "lock")
    assert not second.acquire()
    first.release()
    assert not is_locked(tmp_path / "lock")
    assert second.acquire()
    second.release()


def test_a_lock_ends_with_the_process_that_had_it_though_its_children_live(tmp_path: Path) -> None:
    """A data loader's workers are forked, and have the open file, too."""
    lock = Lock(tmp_path / "lock")
    assert lock.acquire()
    here, there = os.pipe()
    if (child := os.fork()) == 0:
        os.close(there)
        os.read(here, 1)
        os._exit(0)
    lock.release()
    assert not is_locked(tmp_path / "lock")
    os.close(there)
    os.waitpid(child, 0)
    os.close(here)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire(seconds=0.05)
    other = threading.Thread(target=first.release)
    other.start()
    assert second.acquire(seconds=600)
    other.join()
    second.release()


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_keeps_decoded_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    key = content_key("data")
    for _ in range(2):
        stored = get_or_create(key, lambda writer: writer.array("images", (2, 3), "uint8").fill(7), tmp_path)
        assert stored.tensors["images"].tolist() == [[7] * 3] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [key, f"{key}.lock"]


def test_an_error_of_the_disk_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        Lock(tmp_path / "lock").acquire()
