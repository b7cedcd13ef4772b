"""Read the curves of a run from its metrics.csv, thinned for a page of hundreds of runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE = "metrics.csv"
MAX_POINTS = 200  # per curve: more than the pixels of a small chart
MAX_VALUES = 1_500_000  # of all curves of a page, about 15 MB; beyond it, curves get fewer points
SIGNIFICANT_DIGITS = 5  # a chart shows three

# Metrics logged at the same steps: [steps, {metric: values}, number of points before thinning].
Curves = list[tuple[list[int], dict[str, list[float | None]], int]]


def read_curves(folder: Path) -> tuple[Curves, float | None]:
    """Return the thinned curves of a run, and the steps per epoch as inferred from its validations.

    An incomplete last row is skipped, as in `loggers.csv_file.read_rows`; that module imports Lightning.

    Raises:
        ValueError: the file does not have the form that a run writes.
    """
    try:
        names, *rows = list(csv.reader(complete_lines(folder / FILE))) or [[]]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if names[:2] != ["step", "epoch"]:
        raise ValueError("its first columns are not step and epoch")
    if len(set(names)) < len(names):
        raise ValueError("a column is there twice")
    rows = [row for row in rows if len(row) == len(names)]
    for row in rows:
        for name, text in zip(names, row[:2], strict=False):
            if text and not (text.isdecimal() and len(text) < 16):
                raise ValueError(f"a row has {name}={text[:20]}; a whole number from 0 on is needed")
        if not row[0]:
            raise ValueError("a row has no step")
    together: dict[tuple[int, ...], list[str]] = {}
    for column, name in enumerate(names[2:], 2):
        logged = tuple(i for i, row in enumerate(rows) if row[column])
        if logged and not name.startswith("test/"):  # single values, which the record has
            together.setdefault(logged, []).append(name)
    found: Curves = []
    for logged, metrics in together.items():
        kept = [logged[i] for i in thinned_indices(len(logged), MAX_POINTS)]
        values = {name: [rounded(rows[i][names.index(name)]) for i in kept] for name in metrics}
        found.append(([int(rows[i][0]) for i in kept], values, len(logged)))
    validated = [i for i, name in enumerate(names) if name.startswith("val/")]
    ends = [(int(row[0]) + 1) / (int(row[1]) + 1) for row in rows if row[1] and any(row[i] for i in validated)]
    return found, max(ends, default=None)


def complete_lines(file: Path) -> Iterator[str]:
    """Yield the header and each complete row."""
    with file.open(newline="", encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield line


def thinned_indices(length: int, points: int) -> list[int]:
    """Return the indices to keep: the first, the last, and evenly spaced ones between; spikes may be lost."""
    if length <= points:
        return list(range(length))
    return [round(i * (length - 1) / (points - 1)) for i in range(points)]


def rounded(text: str) -> float | None:
    """Return a value with the significant digits that a chart can show; None if it is not finite."""
    value = float(text)
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


def fit_to_page(runs: Iterable[dict[str, Any]]) -> int:
    """Thin the curves of all runs to the size limit of a page.

    Returns:
        The maximum number of points per curve.
    """
    parts = [part for run in runs for part in run["curves"]]
    points = MAX_POINTS
    while points > 10 and sum(min(len(steps), points) * (1 + len(values)) for steps, values, _ in parts) > MAX_VALUES:
        points //= 2
    for part in parts:
        steps, values, _ = part
        kept = thinned_indices(len(steps), points)
        steps[:] = [steps[i] for i in kept]
        for name in values:
            values[name] = [values[name][i] for i in kept]
    return points
