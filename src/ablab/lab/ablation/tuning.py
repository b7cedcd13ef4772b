"""Tuning: each cell gets its own value of a key, chosen in validation, since one learning rate for all is unfair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ablab.lab.ablation.ablation import Ablation
from ablab.lab.ablation.grid import PreparedRun
from ablab.lab.ablation.results import monitored_score


def tuning_outcome(ablation: Ablation, runs: Sequence[PreparedRun], values: Sequence[float]) -> dict[str, Any]:
    """Return the outcome of the tuning runs, as recorded in ablation.json.

    Args:
        ablation: the grid.
        runs: the tuning runs.
        values: the value that each run tried.
    """
    monitor = runs[0].cfg.monitor
    chosen = []
    for cell in ablation.cells():
        scores: dict[float, list[float]] = {}
        for run, value in zip(runs, values, strict=True):
            if run.plan.cell == cell:
                scores.setdefault(value, []).append(monitored_score(run.folder, monitor.metric))
        chosen.append({"cell": cell, "value": best_value(scores, monitor.mode)})
    tried = [{**run.entry, "value": value} for run, value in zip(runs, values, strict=True)]
    return {"metric": monitor.metric, "mode": monitor.mode, "runs": tried, "chosen": chosen}


def best_value(scores: dict[float, list[float]], mode: str) -> float:
    """Return the value with the best mean score; values with a failed seed only count if all have one."""
    sign = 1 if mode == "max" else -1
    means = {value: sign * statistics.fmean(found) for value, found in scores.items()}
    sound = {value: mean for value, mean in means.items() if not math.isnan(mean)}
    return max(sound, key=lambda value: sound[value]) if sound else min(scores)
