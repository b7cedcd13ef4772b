"""Share data between consecutive runs of a sweep in one process."""

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
BATCHING_SETTINGS = ("batch_size", "micro_batch_size", "seed", "num_workers")

Stamps = dict[str, tuple[int, ...]]  # size, modification times and inode of each file


@dataclass(frozen=True)
class Reading:
    """Data that were read.

    Args:
        attributes: attributes of the data module that reading set.
        stamps: stamps of the files named in the settings, taken before reading.
        extra_stamps: stamps of other files that were read.
    """

    attributes: dict[str, Any]
    stamps: Stamps
    extra_stamps: Stamps


kept: dict[str, Reading] | None = None  # the latest reading, by its settings; None disables sharing


@contextmanager
def read_once() -> Iterator[None]:
    """Share data between consecutive runs with equal data settings and unchanged files, within this context.

    Outside the context, every run reads its data, so that a notebook never trains on stale files.
    """
    global kept
    before = kept
    kept = {} if before is None else before
    try:
        yield
    finally:
        kept = before


def setup_data(data: DataModule, settings: Mapping[str, Any]) -> None:
    """Set up a data module, reusing the data of the previous run if settings and files are the same.

    Sharing is safe because data are never modified. Only the latest data are kept, to save memory.

    Args:
        data: a data module that has not been set up.
        settings: the settings that it was built with.
    """
    with status_lines("reading the data"):
        read(data, settings)


def read(data: DataModule, settings: Mapping[str, Any]) -> None:
    if kept is None:
        data.setup("fit")
        return
    key = reading_key(settings, data.scored)
    # taken before reading, so that the next run notices a change during reading
    stamps = file_stamps(named_files(settings))
    reading = kept.get(key)
    if reading is None or reading.stamps != stamps or reading.extra_stamps != file_stamps(reading.extra_stamps):
        kept.clear()
        before = dict(vars(data))
        data.setup("fit")
        attributes = {name: value for name, value in vars(data).items() if value is not before.get(name, data)}
        reading = kept[key] = Reading(attributes, stamps, file_stamps(map(str, data.extra_files)))
    vars(data).update(reading.attributes)
    data.setup("fit")


def reading_key(settings: Mapping[str, Any], scored: str = "test") -> str:
    """Return the settings that determine the samples, as a JSON string."""
    deciding = {name: value for name, value in settings.items() if name not in BATCHING_SETTINGS}
    return json.dumps({**deciding, "scored": scored}, sort_keys=True)


def named_files(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files named in the settings, and the files below the folders named there."""
    for value in settings.values():
        if isinstance(value, str) and os.path.exists(value):
            yield from map(str, list_files(Path(value)).files)


def file_stamps(files: Iterable[str]) -> Stamps:
    """Return size, times and inode of files: a cheap check for changed content."""
    found: Stamps = {}
    for file in files:
        try:
            status = os.stat(file)
        except OSError:  # the file is gone, or was never there
            found[file] = ()
        else:
            found[file] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    return found
