"""Read the results of an ablation from its folder."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ablab.disk import is_locked
from ablab.errors import ConfigError
from ablab.lab.ablation.ablation import Ablation
from ablab.lab.ablation.metrics import check_logged, final_metric, metric_value
from ablab.lab.config.build import add_config_path
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run.code import PACKAGE, sources_of
from ablab.lab.run.folder import ABLATION, LOCK, LOG, failure_reason, read_record
from ablab.lab.run.redaction import redact

STATUSES = ("running", "finished", "stopped", "diverged", "failed")  # that a run writes


@dataclass
class Results:
    """The results of an ablation so far.

    Args:
        ablation: the grid.
        runs: a row for each run: a column for each factor, `seed`, `status` ("finished", "diverged", "failed",
            "stopped", "running" or "missing"), `folder`, `error`, and each metric.
        curves: the metrics.csv of each run, by its folder.
        tuning: a row for each tuning run: the factors, `value`, `seed`, `status`, `score`.
        chosen: the tuned value of each cell: the factors, `value`.
        notes: further remarks for the reader.
    """

    ablation: Ablation
    runs: pd.DataFrame
    curves: dict[str, pd.DataFrame]
    tuning: pd.DataFrame | None = None
    chosen: pd.DataFrame | None = None
    tuned_key: str = ""
    tuning_metric: str = ""
    tuning_mode: str = "max"
    tuning_grid: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_results(folder: Path, *, mix_code: bool = False, baseline: dict[str, str] | None = None) -> Results:
    """Read the results of an ablation's folder so far.

    Args:
        folder: the ablation's folder.
        mix_code: combine runs that were made by different versions of the code.
        baseline: levels to compare with, instead of the ablation's own baseline.

    Raises:
        ConfigError: the folder is not an ablation, its runs were made by different code, or a level does not exist.
    """
    try:
        record = json.loads((folder / ABLATION).read_text(encoding="utf-8"))
        if missing := {"ablation", "runs", "tuning"} - record.keys():
            raise ValueError(f"its {ABLATION} lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = f"there is no {ABLATION} in it" if isinstance(error, FileNotFoundError) else error
        raise ConfigError(
            f"{folder}: it is no ablation's folder ({reason}); give the one that the ablation has in output_dir"
        ) from error
    with add_config_path("ablation"):
        ablation = Ablation(**record["ablation"] | ({"baseline": baseline} if baseline else {}))
    notes = code_notes([folder / run["folder"] for run in record["runs"]], mix_code or ablation.mix_code)
    tuning = record["tuning"]
    notes += unreported_runs_note(folder, [*record["runs"], *(tuning["runs"] if tuning else [])])
    frame, curves = runs_table(folder, record["runs"], ablation)
    results = Results(ablation, frame, curves, notes=notes)
    if tuning is not None and ablation.tune is not None:
        results.tuning = pd.DataFrame([tuning_row(folder, run, tuning["metric"]) for run in tuning["runs"]])
        results.chosen = pd.DataFrame([{**entry["cell"], "value": entry["value"]} for entry in tuning["chosen"]])
        results.tuned_key, results.tuning_grid = ablation.tune.key, ablation.tune.values
        results.tuning_metric, results.tuning_mode = tuning["metric"], tuning["mode"]
    return results


def replace_text(file: Path, text: str) -> None:
    """Write a file atomically, even while several launches write it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def code_notes(folders: list[Path], mix_code: bool) -> list[str]:
    """Return a note if different versions of the code made the runs.

    Raises:
        ConfigError: there are several versions, and `mix_code` is false.
    """
    versions: dict[str, dict[str, list[str]]] = {}  # by part of the code and hash, the commits
    for folder in folders:
        with suppress(ConfigError, LookupError, TypeError):  # the table lists unreadable runs
            record = read_record(folder) if (folder / "run.json").exists() else {"sources": []}
            for part, found in sources_of(record).items():  # cells may use different modules
                versions.setdefault(part, {}).setdefault(found, []).append(str(record.get("git_commit"))[:12])
    descriptions = [
        ("" if part == PACKAGE.name else f"{part}: ")
        + "; ".join(f"{len(commits)} by {code[:8]} (commit {commits[0]})" for code, commits in hashes.items())
        for part, hashes in versions.items()
        if len(hashes) > 1
    ]
    if not descriptions:
        return []
    if not mix_code:
        raise ConfigError(
            f"{folders[0].parent}: its runs were made by different code: {'; '.join(descriptions)}; run the ablation "
            "again, which makes what is missing with today's code, or say --mix-code"
        )
    return [f"The runs were made by different code: {'; '.join(descriptions)}."]


def unreported_runs_note(folder: Path, planned: list[dict[str, Any]]) -> list[str]:
    """Return a note about runs in an ablation's folder that are not part of the report."""
    names = {run["folder"] for run in planned}
    number = sum(file.parent.name not in names for file in folder.glob("*/run.json"))
    if not number:
        return []
    more = f"{number} more runs in this folder are" if number > 1 else "1 more run in this folder is"
    return [f"{more} not in this report: other levels, seeds, settings or code."]


def status_of(folder: Path) -> str:
    """Return the status of a run.

    Returns:
        The status of its record, or "missing"; "stopped" for a run whose process is gone, "failed" for one that ended
        before it had a record, or whose record cannot be read.
    """
    if not (folder / "run.json").exists():
        return "failed" if failure_reason(folder) or has_printed(folder) else "missing"
    try:
        status = read_record(folder)["status"]
    except ConfigError:
        return "failed"
    if status == "interrupted" or (status == "running" and not is_locked(folder / LOCK)):
        return "stopped"
    return status if status in STATUSES else "failed"


def has_printed(folder: Path) -> bool:
    """Return whether a run's log has lines other than Slurm's own."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() and not line.startswith(("srun: ", "slurmstepd")) for line in lines)


def failure_summary(folder: Path) -> str:
    """Return the reason why a run has no result, in one line."""
    if not (folder / "run.json").exists():
        return failure_reason(folder) or ("its process ended without a message" if has_printed(folder) else "not begun")
    try:
        status = read_record(folder)["status"]
    except ConfigError as error:
        return str(error).removeprefix(f"{folder}: ")
    if status not in (*STATUSES, "interrupted"):
        return f"its run.json has status={status!r}; a run writes one of {', '.join(STATUSES)}"
    if status == "running" and is_locked(folder / LOCK):
        return "running"
    found = failure_reason(folder)
    if found.startswith(("Stopped: ", "KeyboardInterrupt")):
        return "stopped"
    return found or ("its process ended without a message" if status in ("running", "failed") else status)


def runs_table(
    folder: Path, runs: list[dict[str, Any]], ablation: Ablation
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return all runs as a table, and their curves by folder.

    Raises:
        ConfigError: no cell has logged one of the metrics.
    """
    rows, curves, records = [], {}, []
    for run in runs:
        place = folder / run["folder"]
        status = status_of(place)
        row = {**run["cell"], "seed": run["seed"], "status": status, "folder": str(place), "error": ""}
        try:  # a damaged run is left out with a reason, and does not affect others
            if status == "finished":
                record, curve = read_record(place), read_curve(place)
                if not isinstance(record.get("metrics"), dict):
                    raise ConfigError("its run.json has no metrics by their names")
                row |= {metric: metric_value(metric, record, curve) for metric in ablation.metrics}
                curves[str(place)] = curve
                records.append((record, curve))
        except Exception as error:
            row |= {"status": "failed", "error": f"left out, its files are damaged: {describe_damage(error, place)}"}
        if status not in ("finished", "missing"):
            row["error"] = redact(failure_summary(place))
            with suppress(Exception):  # if it is readable
                curves[str(place)] = read_curve(place)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=None if rows else [*ablation.factors, "seed", "status", "folder", "error"])
    for metric in ablation.metrics:
        frame[metric] = frame[metric].astype(float) if metric in frame else math.nan
    ended = frame[frame["status"].isin(["finished", "diverged", "failed"])]
    if records and len(ended[[*ablation.factors]].drop_duplicates()) == len(ablation.cells()):
        check_logged(ablation.metrics, records)
    return frame, curves


def describe_damage(error: Exception, folder: Path) -> str:
    """Describe the problem with a run's files in one line."""
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0].removeprefix(f"{folder}: ")


def tuning_row(folder: Path, run: dict[str, Any], metric: str) -> dict[str, Any]:
    place = folder / run["folder"]
    row = {**run["cell"], "value": float(run["value"]), "seed": run["seed"], "status": status_of(place)}
    try:
        return {**row, "score": monitored_score(place, metric)}
    except ConfigError:
        return {**row, "status": "failed", "score": math.nan}


def monitored_score(folder: Path, metric: str) -> float:
    """Return the monitored validation metric of a finished run; NaN for any other run."""
    if status_of(folder) != "finished":
        return math.nan
    try:
        return final_metric(metric, read_record(folder))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}") from error


def read_curve(folder: Path) -> pd.DataFrame:
    """Read a run's metrics.csv; an incomplete last row is skipped."""
    return pd.DataFrame(read_rows(folder) or {"step": [], "epoch": []})
