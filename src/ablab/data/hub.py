"""The Hugging Face Hub: loading a split by name, and what is said when that is not possible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ablab.status import status_lines


@contextmanager
def install_hint() -> Iterator[None]:
    """Say which packages an import is missing."""
    try:
        yield
    except ImportError as error:
        raise ValueError("reading it needs more packages: pip install -e '.[data]'") from error


def load_split(name: str | None, split: str, config: str | None = None, *, streaming: bool = False) -> Any:
    """A split of a data set of the Hub, as a `datasets.Dataset`; streaming gives its `IterableDataset`.

    Raises:
        ValueError: there is no such data set or split, or the Hub cannot be reached.
    """
    with install_hint():
        import datasets
    datasets.disable_progress_bars()
    try:
        with status_lines(f"reading {name}, from the Hugging Face Hub what is not here yet"):
            return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (ConnectionError, OSError, ValueError) as error:
        raise ValueError(
            f"name={name}: its split {split} could not be loaded from the Hugging Face Hub ({error}); "
            "mind the spelling, or give a folder that has its parquet files as data.root"
        ) from error
