"""Load splits from the Hugging Face Hub, with helpful errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ablab.status import status_lines


@contextmanager
def install_hint() -> Iterator[None]:
    """Convert an ImportError to a ValueError that says how to install the packages."""
    try:
        yield
    except ImportError as error:
        raise ValueError("reading it needs more packages: pip install -e '.[data]'") from error


def load_split(name: str | None, split: str, config: str | None = None, *, streaming: bool = False) -> Any:
    """Load a split from the Hub, as a `datasets.Dataset`, or an `IterableDataset` if streaming.

    Raises:
        ValueError: the data set or split does not exist, or the Hub cannot be reached.
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
