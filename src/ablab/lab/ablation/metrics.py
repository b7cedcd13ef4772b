"""Metrics of a report: one number per run, from its record and its curves.

| written | meaning |
|---|---|
| `test/accuracy` | a final metric: of the test, or the validation metric that selected the weights |
| `last(train/loss)`, also `min`, `max`, `mean` | of a column of metrics.csv |
| `steps_until(val/loss <= 0.3)`, also `>=` | the first step at which a column of metrics.csv meets the bound, if any |
| `seconds_until(val/loss <= 0.3)` | the same as a time, at the mean speed of the run |
| `seconds` | the training time, validation included; none for an interrupted run |

"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from hydra.utils import get_class
from omegaconf import DictConfig

from ablab.errors import ConfigError
from ablab.lab.config.errors import menu
from ablab.lab.config.schema import is_guest

OVER_CURVE = re.compile(r"(last|min|max|mean)\((.+)\)")
UNTIL = re.compile(r"(steps|seconds)_until\(\s*(\S+)\s*(<=|>=)\s*(\S+)\s*\)")


def metric_value(metric: str, record: Mapping[str, Any], curve: pd.DataFrame) -> float:
    """Return the value of a metric for one finished run; NaN if it has none.

    Args:
        metric: as in the table above.
        record: the run's run.json.
        curve: the run's metrics.csv.
    """
    if not is_logged(metric, record, curve):
        return math.nan
    if metric == "seconds":
        return training_seconds(record)
    if found := OVER_CURVE.fullmatch(metric):
        values = curve[found[2]].dropna()
        return float(values.iloc[-1] if found[1] == "last" else getattr(values, found[1])())
    if found := UNTIL.fullmatch(metric):
        values, bound = curve[found[2]].dropna(), float(found[4])
        there = values[values <= bound] if found[3] == "<=" else values[values >= bound]
        if there.empty:
            return math.nan
        step = float(curve.loc[there.index[0], "step"])
        last = float(curve["step"].max())
        return step if found[1] == "steps" else training_seconds(record) * step / last if last else math.nan
    return final_metric(metric, record)


def final_metric(metric: str, record: Mapping[str, Any]) -> float:
    """Return a final metric of a run, or NaN if it is missing or not finite.

    Raises:
        ConfigError: the record is damaged.
    """
    metrics = record.get("metrics")
    found = metrics.get(metric) if isinstance(metrics, Mapping) else "no metrics"
    try:
        if isinstance(found, str | bool):
            raise ValueError
        return math.nan if found is None else float(found)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"its run.json has {metric}={str(found)[:40]}, which is no number; bring the file back"
        ) from error


def training_seconds(record: Mapping[str, Any]) -> float:
    taken = record.get("seconds")
    return math.nan if record.get("resumed") or taken is None else float(taken)


def curve_column(metric: str) -> str | None:
    """Return the column of metrics.csv that a metric uses; None for a final metric."""
    if found := OVER_CURVE.fullmatch(metric):
        return found[2]
    return found[2] if (found := UNTIL.fullmatch(metric)) else None


def is_until_metric(metric: str) -> bool:
    """Return whether a missing value of the metric means that a run never reached its bound."""
    return UNTIL.fullmatch(metric) is not None


def is_logged(metric: str, record: Mapping[str, Any], curve: pd.DataFrame) -> bool:
    """Return whether a run has logged the values that a metric needs."""
    name = curve_column(metric)
    if name is not None:
        return name in curve and bool(curve[name].notna().any())
    return metric == "seconds" or metric in record["metrics"]


def check_logged(metrics: Iterable[str], runs: Sequence[tuple[Mapping[str, Any], pd.DataFrame]]) -> None:
    """Refuse a metric that no run has logged.

    Args:
        metrics: of the ablation.
        runs: run.json and metrics.csv of finished runs of all cells; a single cell may lack a value that others log.

    Raises:
        ConfigError: with the metric, and the logged names.
    """
    for metric in metrics:
        if any(is_logged(metric, record, curve) for record, curve in runs):
            continue
        if (name := curve_column(metric)) is not None:
            there = sorted({key for _, curve in runs for key in curve.columns[2:]})
            raise ConfigError(
                f"ablation.metrics: {metric}: {name} was never logged; {menu(name, there, 'metrics.csv')}"
            )
        finals = sorted({key for record, _ in runs for key in record["metrics"]})
        raise ConfigError(
            f"ablation.metrics: {metric} is no final metric; {menu(metric, finals, 'a run')}; last({metric}) is the "
            "last value of a column of metrics.csv"
        )


def check_metrics(metrics: list[str], cfg: DictConfig) -> None:
    """Refuse names that cannot be metrics, before any run. Names from diagnostics are only known after a run.

    Raises:
        ConfigError: with the metric.
    """
    guest = is_guest(cfg)  # external modules name their metrics freely
    task: Any = None if guest else get_class(cfg.task._target_)
    known = [] if guest else [str(cfg.monitor.metric), *(f"test/{name}" for name in task.monitorable)]
    for metric in metrics:
        is_final = re.fullmatch(r"[\w./-]+", metric) is not None
        is_known = metric in ("seconds", *known) or metric.startswith(("test/accuracy/", "test/iou/"))
        if is_final and not guest and not is_known:
            raise ConfigError(
                f"ablation.metrics: {metric} is no final metric; {menu(metric, known, 'a run')}; last({metric}) is the "
                "last value of a column of metrics.csv"
            )
        understood = is_final or OVER_CURVE.fullmatch(metric) is not None
        if found := UNTIL.fullmatch(metric):
            try:
                understood = math.isfinite(float(found[4]))
            except ValueError:
                understood = False
        if not understood:
            raise ConfigError(
                f"ablation.metrics: {metric!r} is not understood; test/accuracy, last(train/loss), "
                "steps_until(val/loss <= 0.3) and seconds are examples"
            )
