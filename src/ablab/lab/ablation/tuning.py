"""One rate for all is the commonest mistake: each cell gets its own, chosen in validation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ablab.lab.ablation.ablation import Ablation
from ablab.lab.ablation.grid import PreparedRun
from ablab.lab.ablation.results import monitored_score


def tuning_outcome(ablation: Ablation, runs: Sequence[PreparedRun], values: Sequence[float]) -> dict[str, Any]:
    """What the tuning runs found, as it is recorded.

    Args:
        ablation: the grid.
        runs: those that tried a value.
        values: the value that each of them tried.
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
    """The value with the best mean score; one that did not end well with every seed only if none did."""
    sign = 1 if mode == "max" else -1
    means = {value: sign * statistics.fmean(found) for value, found in scores.items()}
    sound = {value: mean for value, mean in means.items() if not math.isnan(mean)}
    return max(sound, key=lambda value: sound[value]) if sound else min(scores)
