"""On-disk cache of decoded data sets, created at first use and memory-mapped afterwards.

An entry is a folder named by a hash of its sources, with an .npy file per array and entry.json. It is written under a
temporary name and renamed once it is flushed to disk, so that entries are always complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablab.digest import digest
from ablab.disk import Lock, sync_file, sync_folder
from ablab.status import status_lines

LAYOUT = 1  # layout version of entries, part of their keys
# Without this flag, Linux refuses private mappings of files larger than memory. Python 3.11 has no constant for it.
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the cache.

    Args:
        tensors: memory-mapped tensors, shared by all processes of a machine, and possibly larger than its memory. They
            are copy-on-write: writing never changes the file.
        facts: JSON-serializable metadata.
        digest: hash of the tensors and the metadata, without derived tensors.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    digest: str


class EntryWriter:
    """An entry being created: memory-mapped arrays to fill, and metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, np.memmap[Any, Any]] = {}
        self.derived: set[str] = set()
        self.facts: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: str, *, derived: bool = False) -> np.memmap[Any, Any]:
        """Create a memory-mapped array of zeros.

        Args:
            name: name of the array, and of its tensor in `tensors`.
            shape: shape of the array.
            dtype: a NumPy dtype that torch supports.
            derived: whether the array is computed from the other arrays, and excluded from the entry's digest.

        Raises:
            TypeError: torch does not support the dtype.
            ValueError: the disk is full or not writable.
        """
        assert name not in self.arrays, f"there is an array {name} already"
        size = torch.from_numpy(np.empty(0, dtype)).itemsize * math.prod(shape)
        with explain_write_errors(self.folder.parent, size):
            file = self.folder / f"{name}.npy"
            self.arrays[name] = np.lib.format.open_memmap(file, "w+", dtype, shape)
            allocate(file, self.arrays[name].offset)
        if derived:
            self.derived.add(name)
        return self.arrays[name]

    def finalize(self) -> None:
        """Write the metadata and flush all files to the disk."""
        for array in self.arrays.values():
            array.flush()
        names = sorted(self.arrays.keys() - self.derived)
        contents = [part for name in names for part in (name, torch.from_numpy(self.arrays[name]))]
        entry = {
            "digest": digest(json.dumps(self.facts, sort_keys=True), *contents),
            "bytes": {name: (self.folder / f"{name}.npy").stat().st_size for name in self.arrays},
            "facts": self.facts,
        }
        (self.folder / "entry.json").write_text(json.dumps(entry, indent=1), encoding="utf-8")
        for path in [*self.folder.iterdir(), self.folder]:
            sync_file(path)


def get_or_create(key: str, make: Callable[[EntryWriter], None], folder: Path | None = None) -> CacheEntry:
    """Return the cache entry `key`, creating it if necessary.

    If several processes request a new entry, the first creates it and the others wait.

    Args:
        key: `content_key` of everything that the entry depends on.
        make: fills in a new entry.
        folder: folder of the cache; None for ABLAB_CACHE, else XDG_CACHE_HOME/ablab, else ~/.cache/ablab.

    Raises:
        ValueError: the folder is not writable, or its disk is full. Exceptions of `make` are passed on.
    """
    folder = folder or default_folder()
    entry = folder / key
    with explain_write_errors(folder):
        if (stored := load_entry(entry)) is not None:  # before locking, since the folder may be read-only
            return stored
        folder.mkdir(parents=True, exist_ok=True)
        with status_lines("another process decodes these data, and is waited for"):
            lock = Lock(folder / f"{key}.lock")
            lock.acquire(math.inf)
    # without file locks, several processes create the entry in folders of their own, and the first rename wins
    partial = folder / (f"{key}.part" if lock.is_kept else f"{key}.part.{socket.gethostname()}.{os.getpid()}")
    try:
        with explain_write_errors(folder):
            if (stored := load_entry(entry)) is not None:  # created by another process in the meantime
                return stored
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process; this one holds the lock
            if entry.exists():
                shutil.rmtree(entry)
                warnings.warn(f"{entry}: this entry of the cache is damaged, and is made again", stacklevel=2)
            partial.mkdir()
        try:
            writer = EntryWriter(partial)
            make(writer)
            with explain_write_errors(folder):
                writer.finalize()
                if not entry.exists():
                    partial.rename(entry)
                sync_folder(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)
        stored = load_entry(entry)
        assert stored is not None, f"{entry}: gone as soon as it was made"
        return stored
    finally:
        lock.release()


def content_key(*parts: str | bytes | int | Path) -> str:
    """Return a key for an entry that depends on these parts only; a path stands for its file's content."""
    sha = hashlib.sha256(f"layout {LAYOUT}".encode())
    for part in parts:
        content = repr(part)
        if isinstance(part, Path):
            with part.open("rb") as file:
                content = f"file {hashlib.file_digest(file, 'sha256').hexdigest()}"
        sha.update(f"\n{content}".encode())  # unambiguous, since a repr contains no line break
    return sha.hexdigest()[:32]


def default_folder() -> Path:
    if own := os.environ.get("ABLAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ablab"


def load_entry(entry: Path) -> CacheEntry | None:
    """Load the entry in a folder; return None if it is missing, or a file is missing or has the wrong size."""
    try:
        record = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        files = {name: entry / f"{name}.npy" for name in record["bytes"]}
        if any(file.stat().st_size != record["bytes"][name] for name, file in files.items()):
            return None
        return CacheEntry({name: memory_map(file) for name, file in files.items()}, record["facts"], record["digest"])
    except (FileNotFoundError, LookupError, TypeError, ValueError):
        return None


def memory_map(path: Path) -> Tensor:
    """Memory-map an .npy file as a tensor.

    np.load(mmap_mode="c") fails for files larger than memory, and torch warns about mmap_mode="r".
    """
    header = np.load(path, mmap_mode="r")
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.from_numpy(np.ndarray(header.shape, header.dtype, memory, header.offset))


def allocate(path: Path, start: int) -> None:
    """Allocate disk space for a sparse file, so that a full disk is an error now and not a SIGBUS later."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # glibc falls back to writing zeros
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.seek(start)
            for position in range(start, size, 2**20):
                file.write(bytes(min(2**20, size - position)))


@contextmanager
def explain_write_errors(folder: Path, needed: int = 0) -> Iterator[None]:
    """Convert an OSError to a ValueError that names the folder and a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space, or set ABLAB_CACHE to a folder on another disk"
        else:
            remedy = "set ABLAB_CACHE to a folder that can be written"
        size = f", which needs {needed / 2**20:.1f} MiB" if needed else ""
        raise ValueError(f"{folder}: cannot write decoded data{size} ({error.strerror or error}); {remedy}") from error
