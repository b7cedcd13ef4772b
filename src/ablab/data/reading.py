"""Runs of one sweep, one after another in one process, read equal data once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ablab.data.datamodule import DataModule
from ablab.waiting import awaited

# Of the arguments of `DataModule`, those that say how samples are handed out, not which there are.
HANDED_OUT = ("batch_size", "micro_batch_size", "seed", "num_workers")

kept: dict[str, dict[str, Any]] | None = None  # what the newest reading has found, by what it was of; None: no matter


@contextmanager
def read_once() -> Iterator[None]:
    """Within, data are not read again that are those of the run before.

    Outside they are, as files may have changed: nobody expects a notebook to train on what was there an hour ago.
    """
    global kept
    before = kept
    kept = {} if before is None else before
    try:
        yield
    finally:
        kept = before


def set_up(data: DataModule, settings: Mapping[str, Any]) -> None:
    """Have data read, or take what was read for data with the same settings.

    What is read is only ever looked at, so it can be shared. Only the newest reading is kept: there may be no room for
    two.

    Args:
        data: not read yet.
        settings: that they were built with.
    """
    with awaited("reading the data"):
        read(data, settings)


def read(data: DataModule, settings: Mapping[str, Any]) -> None:
    if kept is None:
        data.setup("fit")
        return
    of = what_is_read(settings, data.scored)
    if of not in kept:
        kept.clear()
        before = dict(vars(data))
        data.setup("fit")
        kept[of] = {name: value for name, value in vars(data).items() if value is not before.get(name, data)}
    vars(data).update(kept[of])
    data.setup("fit")


def what_is_read(settings: Mapping[str, Any], scored: str = "test") -> str:
    """What decides on the samples of data, from their settings."""
    deciding = {name: value for name, value in settings.items() if name not in HANDED_OUT}
    return json.dumps({**deciding, "scored": scored}, sort_keys=True)
