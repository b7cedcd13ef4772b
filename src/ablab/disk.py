"""Files that are written whole or not at all, and file locks, on any file system."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ablab.errors import RunError

PAUSE = 0.02  # seconds between two tries
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
# The answers of file systems that do not sync folders (SMB, some of FUSE); EIO and ENOSPC are not among them.
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}


class Lock:
    """A file that one process has at a time, for as long as it lives.

    Some file systems have no locks: NFS without a lock manager, Lustre without `flock`, some of FUSE. There, every
    process gets the lock, and `is_kept` is False.

    Args:
        path: the file, which is made if it is not there, and stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor: int | None = None
        self.is_kept = True

    def acquire(self, seconds: float = 0.0) -> bool:
        """Take the lock.

        Args:
            seconds: the longest to wait for another process.

        Returns:
            False if another process has it.

        Raises:
            OSError: there can be no such file.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + seconds
        while not self.try_once(descriptor):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return False
            time.sleep(PAUSE)
        self.descriptor = descriptor
        return True

    def try_once(self, descriptor: int) -> bool:
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
        """Give the lock up, if this process has it."""
        if self.descriptor is not None:
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # closing is not enough: workers have been forked
            os.close(self.descriptor)
            self.descriptor = None

    def __del__(self) -> None:
        self.release()


def is_locked(path: Path) -> bool:
    """Return whether a process has a lock; nothing is written, so that this works on a read-only disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # there are no locks
        return False
    finally:
        os.close(descriptor)
    return False


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, if its file system can do that."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when it is complete and on the disk.

    The folder is not made: a run's folder that has been deleted stays so.

    Raises:
        RunError: there is no room for it; what was there before is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)  # the new name, too
    except (OSError, RuntimeError) as error:  # torch wraps what the disk answered
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # the folder may be gone, the file system read-only by now
            temporary.unlink()


def make_parent(path: Path) -> None:
    """Make the folder of a file, and not that folder's parents: the run's own may have been deleted.

    Raises:
        RunError: it cannot be made.
    """
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: Exception) -> RunError:
    """The error for a file that could not be written."""
    if (gone := missing(path.parent)) is not None:
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


def missing(folder: Path) -> Path | None:
    """The outermost of a folder and its parents that is not there; None if the folder is."""
    return next((parent for parent in (*reversed(folder.parents), folder) if not parent.exists()), None)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
