"""Compare two runs to the bit, and find the first step at which they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.errors import ConfigError
from ablab.lab.loggers.csv_file import FILE, read_rows
from ablab.lab.run.folder import read_config, read_environment, read_record

# Statuses that are part of the result. Runs with any other were interrupted, and are compared up to their last row.
SELF_ENDED = ("finished", "diverged")


@dataclass
class Comparison:
    """The result of comparing two runs.

    Args:
        num_rows: rows of metrics.csv that both runs have.
        num_values: logged values that are equal in both.
        first: the step and name of the first value that differs, with both values.
        num_different: values that differ or are missing in one run.
        others: descriptions of differing final metrics, weights and statuses.
        end: a description of the final results that are equal.
    """

    num_rows: int
    num_values: int
    first: tuple[int, str, Any, Any] | None
    num_different: int
    others: list[str]
    end: str

    @property
    def equal(self) -> bool:
        return self.first is None and not self.others


def check_comparable(folder: Path) -> None:
    """Refuse a run that cannot be compared, before training starts.

    Raises:
        ConfigError: the folder is not a run, a record cannot be read, or nothing was logged.
    """
    read_config(folder)
    read_record(folder)
    read_environment(folder)
    try:
        rows = read_rows(folder)
        if any("step" not in row for row in rows):
            raise ValueError("a row has no step")
    except ValueError as error:
        raise ConfigError(f"{folder}: its {FILE} is not what a run writes ({error}); bring the file back") from error
    status = read_record(folder)["status"]
    if not rows and status != "diverged":
        raise ConfigError(f"{folder}: the run is {status} and has logged nothing; there is nothing to compare")


def compare(then: Path, now: Path) -> Comparison:
    """Compare the logs, metrics and weights of two runs; a run that was interrupted is compared up to its last row."""
    records = [read_record(then), read_record(now)]  # before the rows: `then` may still be running
    before, after = read_rows(then), read_rows(now)
    whole = records[0]["status"] in SELF_ENDED
    if not whole:
        after = after[: len(before)]
    differing, num_values = [], 0
    for i in range(max(len(before), len(after))):
        a, b = (rows[i] if i < len(rows) else {} for rows in (before, after))
        for name in sorted(a.keys() | b.keys()):
            if is_equal(a.get(name), b.get(name)):
                num_values += 1
            else:
                differing.append((int((a or b)["step"]), name, a.get(name), b.get(name)))
    return Comparison(
        num_rows=min(len(before), len(after)),
        num_values=num_values,
        first=differing[0] if differing else None,
        num_different=len(differing),
        others=final_differences(*records) if whole else [],
        end=describe_end(records[0]),
    )


def final_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the differences between two records in status, final metrics and weights."""
    found = [] if then["status"] == now["status"] else [f"the run: {then['status']} then, {now['status']} now"]
    for what in ("metrics", "weights_sha256"):
        a, b = then.get(what, {}), now.get(what, {})
        found += [
            f"{what.removesuffix('_sha256')} {name}: {format_value(a.get(name))} then, {format_value(b.get(name))} now"
            for name in sorted(a.keys() | b.keys())
            if a.get(name) != b.get(name)
        ]
    return found


def describe_end(record: dict[str, Any]) -> str:
    """Describe the final results of a run."""
    if record["status"] not in SELF_ENDED:
        return "as far as the run goes"
    weights: dict[str, str] = record.get("weights_sha256", {})
    if not weights:
        return f"both have {record['status']}"
    return "final metrics and weights " + ", ".join(f"{name} {format_value(weights[name])}" for name in sorted(weights))


def format_value(value: Any) -> str:
    """Return a hash shortened to its beginning, and a number in full."""
    if value is None:
        return "none"
    return f"{value[:12]}…" if isinstance(value, str) else repr(value)


def is_equal(a: float | None, b: float | None) -> bool:
    """Return whether two values are equal; NaN equals NaN."""
    return a == b or (a is not None and b is not None and a != a and b != b)


def format_comparison(found: Comparison) -> str:
    """Describe a comparison."""
    if found.equal:
        return f"equal to the bit: {found.num_rows:,} rows, {found.num_values:,} values, {found.end}"
    lines = []
    if found.first is not None:
        step, name, then, now = found.first
        rest = f"; {found.num_different - 1:,} more values differ" if found.num_different > 1 else ""
        lines.append(
            f"they part first at step {step}: {name} was {format_value(then)} and is {format_value(now)}{rest}"
        )
    return "\n".join([*lines, *found.others])
