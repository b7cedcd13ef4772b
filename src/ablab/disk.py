"""File locks and syncs that also work on file systems without them."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

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
