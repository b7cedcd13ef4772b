"""The metrics of a run as a CSV file, written whatever else records them."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ablab.disk import sync_folder, write_error, write_text

FILE = "metrics.csv"
FIRST_COLUMNS = ["step", "epoch"]


class MetricsCSV(Logger):
    """`metrics.csv` in the run's folder: a row for each logged step, a column for each metric, empty where not logged.

    Values are written so that reading them gives the same float. A new column rewrites the file, by way of a
    temporary one, so that it is complete at any moment.

    Args:
        folder: the run's folder.
        rows: what a resumed run has logged up to its checkpoint, see `read_rows`; later rows of the file are dropped,
            the run logs them again.
        seconds: the longest that a row waits in memory for another one before both are written.
    """

    def __init__(self, folder: Path, *, rows: list[dict[str, Any]] | None = None, seconds: float = 1.0) -> None:
        super().__init__()
        self.path = folder / FILE
        self.seconds = seconds
        self.saved_at = 0.0
        self.rows: list[dict[str, Any]] = rows or []
        self.columns: list[str] = []  # of the file as it is
        self.num_written = 0

    # Lightning asks these three to find the folder of checkpoints.
    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({"step": step, **metrics})
        if time.monotonic() - self.saved_at > self.seconds:
            self.save()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged so far.

        Raises:
            RunError: there is no room for it; the file is as it was.
        """
        self.saved_at = time.monotonic()
        new = self.rows[self.num_written :]
        if not new:
            return
        names = {name for row in new for name in row} - {*FIRST_COLUMNS, *self.columns}
        if self.columns and not self.path.exists() and self.path.parent.exists():
            print(f"warning: {self.path}: it was deleted, and is written again with all rows", file=sys.stderr)
            self.columns = []
        if names or not self.columns:
            # sorted: the file is the same however often it was written
            every = {name for row in self.rows for name in row}
            columns = [*FIRST_COLUMNS, *sorted(every - set(FIRST_COLUMNS))]
            write_text(self.path, table(columns, self.rows, header=True))
            self.columns = columns
        else:
            self.append(table(self.columns, new, header=False))
        self.num_written = len(self.rows)

    def append(self, text: str) -> None:
        length = None
        try:
            length = self.path.stat().st_size
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            with suppress(OSError):  # it may be gone, or read-only by now
                if length is not None:
                    os.truncate(self.path, length)
            raise write_error(self.path, error) from error

    def sync(self) -> int:
        """Have every row on the disk.

        Returns:
            how many there are.
        """
        self.save()
        try:
            if self.path.exists():
                with self.path.open("rb+") as file:
                    os.fsync(file.fileno())
                sync_folder(self.path.parent)  # its name, too
        except OSError as error:
            raise write_error(self.path, error) from error
        return len(self.rows)

    def finalize(self, status: str) -> None:
        self.save()


def table(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    """Rows as they are in the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_logged(row: Mapping[str, float]) -> tuple[dict[str, float], int]:
    """The values of a row, and the step at which they were logged."""
    return {name: value for name, value in row.items() if name != "step"}, int(row["step"])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.csv, each with what was logged in it; a last row that was cut off is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    return [
        {name: number(text) for name, text in row.items() if text}
        for row in csv.DictReader(complete)
        if None not in row
    ]


def number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)
