"""Atomic file writes and file locks that work on any file system."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ablab.errors import RunError

PAUSE = 0.02  # seconds between two attempts to acquire a lock
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
# Errors of file systems that cannot fsync directories (SMB, some FUSE); EIO and ENOSPC are real failures.
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


class Lock:
    """A file lock that one process holds at a time, until it releases it or ends.

    On file systems without locks (NFS without a lock manager, Lustre without `flock`, some FUSE), every process
    acquires the lock, and `is_kept` is False.

    Args:
        path: the lock file; created if missing, and never deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None
        self.is_kept = True

    def acquire(self, seconds: float = 0.0) -> bool:
        """Acquire the lock.

        Args:
            seconds: maximum time to wait for another process.

        Returns:
            False if another process holds it.

        Raises:
            OSError: the file cannot be opened or created.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + seconds
        while not self.try_acquire(descriptor):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return False
            time.sleep(PAUSE)
        self.descriptor = descriptor
        return True

    def try_acquire(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            self.is_kept = False
        return True

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        if self.descriptor is not None:
            with suppress(OSError):  # on a file system without locks
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # closing is not enough: forked workers share the lock
            os.close(self.descriptor)
            self.descriptor = None

    def __del__(self) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Return whether any process holds a lock; writes nothing, so that it works on read-only file systems."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no lock support
        return False
    finally:
        os.close(descriptor)
    return False


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a directory's entries to the disk, if the file system supports it."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, then flush it and rename it to `path`.

    Does not create the directory, so that a deleted run folder is not recreated.

    Raises:
        RunError: writing failed; an existing file at `path` is unchanged.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)  # makes the rename durable
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for disk errors
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):  # the directory may have been deleted, or become read-only
            temporary.unlink()


def make_parent_dir(path: Path) -> None:
    """Create the directory of a file, but not its parents, since the run folder may have been deleted.

    Raises:
        RunError: it cannot be created.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: Exception) -> RunError:
    """Return the error to raise for a file that could not be written."""
    if (gone := first_missing_dir(path.parent)) is not None:
        return RunError(
            f"{gone}: the run's folder is gone, deleted or moved while the run was going on; nothing is written there "
            "anew. The same command begins the run again; with the folder back in its place, it can be resumed"
        )
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return RunError(
            f"{path}: it could not be written ({error.strerror}); allow more open files (ulimit -n 4096), or use fewer "
            "data.num_workers, then resume the run"
        )
    return RunError(
        f"{path}: it could not be written ({error}); the run ends here, the checkpoints before it are intact. "
        "With room on the disk, resume the run"
    )


def first_missing_dir(folder: Path) -> Path | None:
    """Return the topmost missing directory among `folder` and its parents; None if `folder` exists."""
    return next((parent for parent in (*reversed(folder.parents), folder) if not parent.exists()), None)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
