"""Decoded data sets on disk: made at their first use, mapped into memory afterwards.

An entry is a folder named by a hash of what it is made from; it has an .npy for each array, and entry.json. It is
written under another name and renamed once the disk has all of it, so an entry is whole or not there.
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

LAYOUT = 1  # of an entry: one of another layout has another key
# sets no memory aside for writing into a mapping: without it Linux refuses files larger than memory; 3.11 has no name
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Stored:
    """An entry of the cache.

    Args:
        tensors: mapped from their files: all processes of a machine share them, and they may be larger than its memory.
            Writing into one changes this process's copy, never the file.
        facts: what JSON can hold.
        digest: a hash of the tensors and the facts; it leaves out tensors that follow from the others.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    digest: str


class Writer:
    """An entry that is being made: arrays to fill in, piece by piece, and facts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays: dict[str, np.memmap[Any, Any]] = {}
        self.derived: set[str] = set()
        self.facts: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: str, *, derived: bool = False) -> np.memmap[Any, Any]:
        """A new array of zeros on the disk.

        Args:
            derived: it follows from the other arrays, and is not part of the entry's digest.

        Raises:
            TypeError: torch has no such dtype.
            ValueError: the disk has no room for it, or cannot be written.
        """
        assert name not in self.arrays, f"there is an array {name} already"
        size = torch.from_numpy(np.empty(0, dtype)).itemsize * math.prod(shape)
        with writing(self.folder.parent, size):
            file = self.folder / f"{name}.npy"
            self.arrays[name] = np.lib.format.open_memmap(file, "w+", dtype, shape)
            take_space(file, self.arrays[name].offset)
        if derived:
            self.derived.add(name)
        return self.arrays[name]

    def finish(self) -> None:
        """Bring everything to the disk."""
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


def cached(key: str, make: Callable[[Writer], None], folder: Path | None = None) -> Stored:
    """The entry named `key`; of all processes that ask for a new one, the first makes it and the others wait.

    Args:
        key: from `content_key`, of everything that the entry depends on.
        make: called if there is no whole entry.
        folder: of the cache; None is ABLAB_CACHE, or else XDG_CACHE_HOME/ablab, or else ~/.cache/ablab.

    Raises:
        ValueError: the folder cannot be written, or its disk is full. What `make` raises is passed on.
    """
    folder = folder or default_folder()
    entry = folder / key
    with writing(folder):
        if (stored := load(entry)) is not None:  # without the lock, as the folder may be read-only
            return stored
        folder.mkdir(parents=True, exist_ok=True)
        with status_lines("another process decodes these data, and is waited for"):
            lock = Lock(folder / f"{key}.lock")
            lock.acquire(math.inf)
    # without locks several processes make the entry, each in a folder of its own, and the first one is kept
    partial = folder / (f"{key}.part" if lock.is_kept else f"{key}.part.{socket.gethostname()}.{os.getpid()}")
    try:
        with writing(folder):
            if (stored := load(entry)) is not None:  # made by another process meanwhile
                return stored
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: nobody else can hold the lock
            if entry.exists():
                shutil.rmtree(entry)
                warnings.warn(f"{entry}: this entry of the cache is damaged, and is made again", stacklevel=2)
            partial.mkdir()
        try:
            writer = Writer(partial)
            make(writer)
            with writing(folder):
                writer.finish()
                if not entry.exists():
                    partial.rename(entry)
                sync_folder(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)
        stored = load(entry)
        assert stored is not None, f"{entry}: gone as soon as it was made"
        return stored
    finally:
        lock.release()


def content_key(*parts: str | bytes | int | Path) -> str:
    """A name for whatever is made from these parts alone; a path stands for the content of its file, not its name."""
    found = hashlib.sha256(f"layout {LAYOUT}".encode())
    for part in parts:
        content = repr(part)
        if isinstance(part, Path):
            with part.open("rb") as file:
                content = f"file {hashlib.file_digest(file, 'sha256').hexdigest()}"
        found.update(f"\n{content}".encode())  # no repr has a line break in it
    return found.hexdigest()[:32]


def default_folder() -> Path:
    if own := os.environ.get("ABLAB_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ablab"


def load(entry: Path) -> Stored | None:
    """The entry in a folder; None if it is not there, or not whole: its files are there, as long as they were made."""
    try:
        record = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        files = {name: entry / f"{name}.npy" for name in record["bytes"]}
        if any(file.stat().st_size != record["bytes"][name] for name, file in files.items()):
            return None
        return Stored({name: mapped(file) for name, file in files.items()}, record["facts"], record["digest"])
    except (FileNotFoundError, LookupError, TypeError, ValueError):
        return None


def mapped(path: Path) -> Tensor:
    """An .npy as a tensor; np.load(mmap_mode="c") fails for a file larger than memory, and torch warns about "r"."""
    header = np.load(path, mmap_mode="r")
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    return torch.from_numpy(np.ndarray(header.shape, header.dtype, memory, header.offset))


def take_space(path: Path, start: int) -> None:
    """Give a sparse file its space on the disk: one that is full is an error now, not a SIGBUS in the mapping later."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # where a file system has no such thing, glibc writes zeros
            os.posix_fallocate(file.fileno(), 0, size)
        else:  # macOS
            file.seek(start)
            for position in range(start, size, 2**20):
                file.write(bytes(min(2**20, size - position)))


@contextmanager
def writing(folder: Path, needed: int = 0) -> Iterator[None]:
    """Say which folder could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space, or set ABLAB_CACHE to a folder on another disk"
        else:
            remedy = "set ABLAB_CACHE to a folder that can be written"
        size = f", which needs {needed / 2**20:.1f} MiB" if needed else ""
        raise ValueError(f"{folder}: cannot write decoded data{size} ({error.strerror or error}); {remedy}") from error
