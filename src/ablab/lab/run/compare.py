"""Two runs, compared to the bit: the first step at which they part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablab.errors import ConfigError
from ablab.lab.loggers.csv_file import FILE, read_rows
from ablab.lab.run.folder import config_of, read_environment, read_record

# Ends that follow from the run itself. Any other came from outside, and such a run is compared as far as it goes.
OF_ITSELF = ("finished", "diverged")


@dataclass
class Comparison:
    """What is equal in two runs, and where they part.

    Args:
        num_rows: of metrics.csv that both have.
        num_values: that both have logged and that are equal.
        first: the step and the name of the first value that differs, with both values.
        num_different: values that differ or that only one of them has.
        others: final metrics and weights that differ, and another end, each in words.
        end: what is equal beside the rows, in words.
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
    """Refuse a run that nothing can be compared with, before a training is spent on it.

    Raises:
        ConfigError: the folder is no run's, a record in it cannot be read, or it has logged nothing.
    """
    config_of(folder)
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
    """Compare what two runs have logged, found and learned; one that was ended from outside as far as it goes."""
    records = [read_record(then), read_record(now)]  # before the rows: `then` may be going on
    before, after = read_rows(then), read_rows(now)
    whole = records[0]["status"] in OF_ITSELF
    if not whole:
        after = after[: len(before)]
    differing, num_values = [], 0
    for i in range(max(len(before), len(after))):
        a, b = (rows[i] if i < len(rows) else {} for rows in (before, after))
        for name in sorted(a.keys() | b.keys()):
            if same(a.get(name), b.get(name)):
                num_values += 1
            else:
                differing.append((int((a or b)["step"]), name, a.get(name), b.get(name)))
    return Comparison(
        num_rows=min(len(before), len(after)),
        num_values=num_values,
        first=differing[0] if differing else None,
        num_different=len(differing),
        others=differences_at_the_end(*records) if whole else [],
        end=end_of(records[0]),
    )


def differences_at_the_end(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in two records of how a run ended, and with what."""
    found = [] if then["status"] == now["status"] else [f"the run: {then['status']} then, {now['status']} now"]
    for what in ("metrics", "weights_sha256"):
        a, b = then.get(what, {}), now.get(what, {})
        found += [
            f"{what.removesuffix('_sha256')} {name}: {shown(a.get(name))} then, {shown(b.get(name))} now"
            for name in sorted(a.keys() | b.keys())
            if a.get(name) != b.get(name)
        ]
    return found


def end_of(record: dict[str, Any]) -> str:
    """What a run ended with, in words."""
    if record["status"] not in OF_ITSELF:
        return "as far as the run goes"
    weights: dict[str, str] = record.get("weights_sha256", {})
    if not weights:
        return f"both have {record['status']}"
    return "final metrics and weights " + ", ".join(f"{name} {shown(weights[name])}" for name in sorted(weights))


def shown(value: Any) -> str:
    """A value as a person compares it: a hash by its beginning, a number in full."""
    if value is None:
        return "none"
    return f"{value[:12]}…" if isinstance(value, str) else repr(value)


def same(a: float | None, b: float | None) -> bool:
    """Whether two values are equal; NaN equals NaN."""
    return a == b or (a is not None and b is not None and a != a and b != b)


def report(found: Comparison) -> str:
    """A comparison in words."""
    if found.equal:
        return f"equal to the bit: {found.num_rows:,} rows, {found.num_values:,} values, {found.end}"
    lines = []
    if found.first is not None:
        step, name, then, now = found.first
        rest = f"; {found.num_different - 1:,} more values differ" if found.num_different > 1 else ""
        lines.append(f"they part first at step {step}: {name} was {shown(then)} and is {shown(now)}{rest}")
    return "\n".join([*lines, *found.others])
