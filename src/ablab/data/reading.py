"""Runs of one sweep, one after another in one process, read equal data once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.data.datamodule import DataModule
from ablab.data.files import list_files
from ablab.status import status_lines

# Arguments of `DataModule` that affect batching, not the samples.
HANDED_OUT = ("batch_size", "micro_batch_size", "seed", "num_workers")

Stamps = dict[str, tuple[int, ...]]  # of files: size, times of change, inode


@dataclass(frozen=True)
class Reading:
    """Data that were read.

    Args:
        attributes: what reading set in the data module.
        stamps: of the files that the settings name, before they were read.
        outside: of other files that were read.
    """

    attributes: dict[str, Any]
    stamps: Stamps
    outside: Stamps


kept: dict[str, Reading] | None = None  # the newest reading, by its settings; None: every run reads its own data


@contextmanager
def read_once() -> Iterator[None]:
    """Within, a run with the same data settings as the run before shares its data, as long as no file has changed.

    Outside they are read anew: nobody expects a notebook to train on the files of an hour ago.
    """
    global kept
    before = kept
    kept = {} if before is None else before
    try:
        yield
    finally:
        kept = before


def set_up(data: DataModule, settings: Mapping[str, Any]) -> None:
    """Read data, or take what was read for data with the same settings and files.

    Nobody writes to data that were read, so that they can be shared. Only the newest reading is kept: there may be no
    room for two.

    Args:
        data: not read yet.
        settings: the settings they were built with.
    """
    with status_lines("reading the data"):
        read(data, settings)


def read(data: DataModule, settings: Mapping[str, Any]) -> None:
    if kept is None:
        data.setup("fit")
        return
    key = what_is_read(settings, data.scored)
    stamps = stamps_of(named_files(settings))  # before reading: a change meanwhile is then seen by the next run
    reading = kept.get(key)
    if reading is None or reading.stamps != stamps or reading.outside != stamps_of(reading.outside):
        kept.clear()
        before = dict(vars(data))
        data.setup("fit")
        attributes = {name: value for name, value in vars(data).items() if value is not before.get(name, data)}
        reading = kept[key] = Reading(attributes, stamps, stamps_of(map(str, data.outside)))
    vars(data).update(reading.attributes)
    data.setup("fit")


def what_is_read(settings: Mapping[str, Any], scored: str = "test") -> str:
    """Return the settings that decide on the samples of data, as one string."""
    deciding = {name: value for name, value in settings.items() if name not in HANDED_OUT}
    return json.dumps({**deciding, "scored": scored}, sort_keys=True)


def named_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files that settings name, and the files below the folders that they name."""
    for value in settings.values():
        if isinstance(value, str) and os.path.exists(value):
            yield from map(str, list_files(Path(value)).files)


def stamps_of(files: Iterable[str]) -> Stamps:
    """Return what changes with the content of files; looking at it is cheap."""
    found: Stamps = {}
    for file in files:
        try:
            status = os.stat(file)
        except OSError:  # the file is gone, or was never there
            found[file] = ()
        else:
            found[file] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return found
