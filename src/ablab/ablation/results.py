"""The results of an ablation, read from its folder."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ablab.ablation.ablation import Ablation
from ablab.ablation.metrics import check_logged, value
from ablab.config.build import blame
from ablab.config.errors import ConfigError
from ablab.runs.folder import ABLATION, LOG, is_taken, last_line, read_record
from ablab.runs.metrics import read_rows


@dataclass
class Results:
    """What an ablation found so far.

    Args:
        ablation: the grid.
        runs: a row for each run of it: a column for each factor, `seed`, `status` ("finished", "diverged", "failed",
            "stopped", "running" or "missing"), `folder`, `error`, and each metric.
        curves: the metrics.csv of each run, by its folder.
        tuning: a row for each run that decided on the tuned key: the factors, `value`, `seed`, `status`, `score`.
        chosen: the value that each cell got: the factors, `value`.
        notes: what else a reader should know.
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


def read(folder: Path, *, mix_code: bool = False, baseline: dict[str, str] | None = None) -> Results:
    """What the runs of an ablation's folder have found so far.

    Args:
        folder: the ablation's.
        mix_code: take runs that were made by different versions of the code together.
        baseline: the level of each of some factors to compare with, instead of the ablation's own.

    Raises:
        ConfigError: it is no ablation's folder, its runs were made by different code, or the baseline is no level.
    """
    try:
        record = json.loads((folder / ABLATION).read_text())
    except (OSError, ValueError) as error:
        reason = f"there is no {ABLATION} in it" if isinstance(error, FileNotFoundError) else error
        raise ConfigError(
            f"{folder}: it is no ablation's folder ({reason}); give the one that the ablation has in output_dir"
        ) from error
    with blame("ablation"):
        ablation = Ablation(**record["ablation"] | ({"baseline": baseline} if baseline else {}))
    notes = code_notes([folder / run["folder"] for run in record["runs"]], mix_code or ablation.mix_code)
    frame, curves = table(folder, record["runs"], ablation)
    results = Results(ablation, frame, curves, notes=notes)
    if (tuning := record["tuning"]) is not None and ablation.tune is not None:
        results.tuning = pd.DataFrame([tuning_row(folder, run, tuning["metric"]) for run in tuning["runs"]])
        results.chosen = pd.DataFrame([{**entry["cell"], "value": entry["value"]} for entry in tuning["chosen"]])
        results.tuned_key, results.tuning_grid = ablation.tune.key, ablation.tune.values
        results.tuning_metric, results.tuning_mode = tuning["metric"], tuning["mode"]
    return results


def put(file: Path, text: str) -> None:
    """Write a file, whole or not at all, also where several launches do."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, file)


def code_notes(folders: list[Path], mix_code: bool) -> list[str]:
    """What is to be said of the versions of the code that made the runs.

    Raises:
        ConfigError: they are several, and are not to be mixed.
    """
    versions: dict[str, list[str]] = {}
    for folder in folders:
        if (folder / "run.json").exists():
            record = read_record(folder)
            versions.setdefault(record["identity"]["code"], []).append(str(record.get("git_commit"))[:12])
    if len(versions) < 2:
        return []
    said = "; ".join(f"{len(commits)} by {code[:8]} (commit {commits[0]})" for code, commits in versions.items())
    if not mix_code:
        raise ConfigError(
            f"{folders[0].parent}: its runs were made by different code: {said}; run the ablation again, which makes "
            "what is missing with today's code, or say --mix-code"
        )
    return [f"The runs were made by different code: {said}."]


def status_of(folder: Path) -> str:
    """How far a run is: the status of its record, or "missing"; one that nobody is at any more is "stopped"."""
    if not (folder / "run.json").exists():
        return "failed" if last_line(folder / LOG) else "missing"
    status = str(read_record(folder)["status"])
    return "stopped" if status == "interrupted" or (status == "running" and not is_taken(folder)) else status


def table(folder: Path, runs: list[dict[str, Any]], ablation: Ablation) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """All runs as a table, and their curves by folder.

    Raises:
        ConfigError: no cell has logged one of the metrics.
    """
    rows, curves, records = [], {}, []
    for run in runs:
        place = folder / run["folder"]
        status = status_of(place)
        row = {**run["cell"], "seed": run["seed"], "status": status, "folder": str(place), "error": ""}
        if status == "finished":
            record, curve = read_record(place), read_curve(place)
            row |= {metric: value(metric, record, curve) for metric in ablation.metrics}
            curves[str(place)] = curve
            records.append((record, curve))
        elif status != "missing":
            curves[str(place)] = read_curve(place)
            row["error"] = last_line(place / LOG).removeprefix("error: ") if status in ("failed", "diverged") else ""
        rows.append(row)
    frame = pd.DataFrame(rows, columns=None if rows else [*ablation.factors, "seed", "status", "folder", "error"])
    for metric in ablation.metrics:
        frame[metric] = frame[metric].astype(float) if metric in frame else math.nan
    ended = frame[frame["status"].isin(["finished", "diverged", "failed"])]
    if records and len(ended[[*ablation.factors]].drop_duplicates()) == len(ablation.cells()):
        check_logged(ablation.metrics, records)
    return frame, curves


def tuning_row(folder: Path, run: dict[str, Any], metric: str) -> dict[str, Any]:
    place = folder / run["folder"]
    row = {**run["cell"], "value": float(run["value"]), "seed": run["seed"], "status": status_of(place)}
    return {**row, "score": score(place, metric)}


def score(folder: Path, metric: str) -> float:
    """What a finished run had of the validation metric that chose its weights; NaN of any other."""
    if status_of(folder) != "finished":
        return math.nan
    found = read_record(folder)["metrics"].get(metric)
    return math.nan if found is None else float(found)


def read_curve(folder: Path) -> pd.DataFrame:
    """A run's metrics.csv; a last row that was cut off is left out."""
    return pd.DataFrame(read_rows(folder) or {"step": [], "epoch": []})
