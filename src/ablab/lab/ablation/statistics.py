"""Statistics of an ablation: means, differences paired by seed, significance and power."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

LEVEL = 0.95
POWER = 0.8
SMALLEST_SPREAD = 0.1  # of a resample, relative to that of the values
MIN_BOOTSTRAP_VALUES = 5  # with fewer, resamples often have no spread
RESAMPLES = 2000
MAX_SEEDS = 10_000  # larger numbers are not worth reporting
ROUNDING = 4 * float(np.finfo(np.float32).eps)  # of a difference of float32 metrics, relative to the larger one
NORMAL_GRID = np.linspace(-8, 8, 2001)  # grid of the integral in `power`

Values = NDArray[np.float64]


def cells(runs: pd.DataFrame, factors: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Return the mean, standard deviation and t interval of every metric, over the finished runs of each cell.

    Args:
        runs: a row for each run, see `ablab.lab.ablation.results.Results`.
        factors: the factors of a cell.
        metrics: columns of `runs`.

    Returns:
        A row for each cell and metric: the factors, `metric`, `n`, `mean`, `sd`, `low`, `high`; and how many of the
        cell's runs are `diverged`, `failed`, or `missing` for any other reason; `none` counts finished runs without a
        value.
    """
    rows = []
    for cell, group in by_cell(runs, factors):
        states = group["status"]
        counts = {
            "diverged": int((states == "diverged").sum()),
            "failed": int((states == "failed").sum()),
            "missing": int((~states.isin(["finished", "diverged", "failed"])).sum()),
        }
        finished = group[states == "finished"]
        for metric in metrics:
            values = finite_values(finished[metric])
            low, high = t_interval(values)
            row = {**cell, "metric": metric, "n": len(values), "mean": mean(values), "sd": sd(values)}
            rows.append({**row, "low": low, "high": high, **counts, "none": len(finished) - len(values)})
    return pd.DataFrame(rows)


def comparisons(runs: pd.DataFrame, factors: Sequence[str], baseline: dict[str, str], metric: str) -> pd.DataFrame:
    """Compare each cell with the one that has the baseline's levels and is otherwise equal, paired by seed.

    The p of the two-sided paired t-test is corrected for multiple comparisons by Holm's method, and the verdict is its
    significance at 5 %. The 95 % intervals are not corrected.

    Args:
        runs: a row for each run.
        factors: the factors of a cell.
        baseline: the level of some factors, or of all.
        metric: a column of `runs`.

    Returns:
        A row for each comparison: the factors, `metric`, `n` (pairs), `difference` (mean), `sd` (of the differences),
        `low` and `high` (t interval), `boot_low` and `boot_high` (bootstrap, from 5 pairs on), `effect` (the mean
        over the standard deviation of the differences, with Hedges' correction), `p`, `holm`, `verdict` ("higher",
        "lower", "cannot tell"), `seeds_needed` (for 80 % power, if the difference is the observed one), `tells` (the
        minimum detectable difference of n pairs at that power), `lost` (seeds of either cell without a pair), `none`
        and `baseline_none` (finished runs of the cell, and of the other one, without a value).

    References:
        Holm 1979, https://www.jstor.org/stable/4615733
        Hedges 1981, https://doi.org/10.3102/10769986006002107
        Efron & Tibshirani 1993 (the studentized bootstrap), An Introduction to the Bootstrap, chapter 12
    """
    groups = {tuple(cell.values()): (cell, group) for cell, group in by_cell(runs, factors)}
    rows: list[dict[str, object]] = []
    for cell, group in groups.values():
        reference = {**cell, **baseline}
        if reference == cell or tuple(reference.values()) not in groups:
            continue
        other = groups[tuple(reference.values())][1]
        differences = paired_differences(group, other, metric)
        lost = len(set(group["seed"]) | set(other["seed"])) - len(differences)
        without = {"none": num_without_value(group, metric), "baseline_none": num_without_value(other, metric)}
        rows.append({**cell, "metric": metric, **summarize(differences), "lost": lost, **without})
    frame = pd.DataFrame(rows)
    if rows:
        frame["holm"] = holm(frame["p"].to_numpy())
        frame["verdict"] = [verdict(row["difference"], row["holm"]) for _, row in frame.iterrows()]
        ranks = frame["p"].rank(method="first")  # NaN where p is NaN, which Holm leaves out
        alphas = (1 - LEVEL) / (frame["p"].count() - ranks + 1)  # the threshold of each comparison in Holm's order
        frame["seeds_needed"] = [
            seeds_needed(d, s, alpha) for d, s, alpha in zip(frame["difference"], frame["sd"], alphas, strict=True)
        ]
        frame["tells"] = [
            minimum_detectable_difference(n, s, alpha)
            for n, s, alpha in zip(frame["n"], frame["sd"], alphas, strict=True)
        ]
    return frame


def num_without_baseline(runs: pd.DataFrame, factors: Sequence[str], baseline: dict[str, str]) -> int:
    """Return the number of cells whose baseline is excluded."""
    there = [cell for cell, _ in by_cell(runs, factors)]
    return sum({**cell, **baseline} not in there for cell in there)


def by_cell(runs: pd.DataFrame, factors: Sequence[str]) -> list[tuple[dict[str, str], pd.DataFrame]]:
    """Return the runs of each cell, in order of first appearance."""
    if not factors:
        return [({}, runs)]
    grouped = runs.groupby(list(factors), sort=False)
    return [(dict(zip(factors, key, strict=True)), group) for key, group in grouped]


def paired_differences(group: pd.DataFrame, other: pd.DataFrame, metric: str) -> Values:
    """Return the differences of a metric by seed, for seeds with both values."""
    ours, theirs = (
        frame[frame["status"] == "finished"].set_index("seed")[metric].astype(float) for frame in (group, other)
    )
    size = max(np.abs(finite_values(ours)).max(initial=0), np.abs(finite_values(theirs)).max(initial=0))
    return snap_rounding(finite_values(ours.sub(theirs).dropna()), float(size))


def snap_rounding(differences: Values, size: float) -> Values:
    """Return differences, made equal if they only differ by float32 rounding of metrics of this size."""
    rounding = ROUNDING * size
    if len(differences) == 0 or np.ptp(differences) > rounding:
        return differences
    return np.full_like(differences, 0.0 if abs(mean(differences)) <= rounding else differences[0])


def num_without_value(group: pd.DataFrame, metric: str) -> int:
    """Return the number of finished runs without a value of a metric."""
    values = group[group["status"] == "finished"][metric]
    return len(values) - len(finite_values(values))


def summarize(differences: Values) -> dict[str, float]:
    """Return the statistics of a single comparison."""
    n, spread, p = len(differences), sd(differences), p_value(differences)
    low, high = t_interval(differences) if not math.isnan(p) else (math.nan, math.nan)
    boot_low, boot_high = bootstrap_interval(differences)
    effect = math.nan
    if n >= 3 and spread > 0:
        effect = mean(differences) / spread * (1 - 3 / (4 * (n - 1) - 1))
    found = {"n": n, "difference": mean(differences), "sd": spread, "low": low, "high": high}
    return {**found, "boot_low": boot_low, "boot_high": boot_high, "effect": effect, "p": p}


def p_value(differences: Values) -> float:
    """Return the two-sided p of the paired t-test; NaN for fewer than 2 pairs, or if all differ by the same amount.

    Such pairs have no spread to test against. The limit of the test, 0, would make ties significant in metrics with few
    values, such as step counts, however many comparisons there are. Pairs without any difference have p = 1.
    """
    if len(differences) < 2:
        return math.nan
    if has_no_spread(differences):
        return 1.0 if mean(differences) == 0 else math.nan
    return float(stats.ttest_1samp(differences, 0).pvalue)


def has_no_spread(values: Values) -> bool:
    return sd(values) <= 1e-12 * abs(mean(values))


def holm(p: Values) -> Values:
    """Return Holm's step-down correction of p values; NaN values are left out."""
    corrected = np.full(len(p), math.nan)
    known = np.flatnonzero(~np.isnan(p))
    largest = 0.0
    for rank, i in enumerate(known[np.argsort(p[known], kind="stable")]):
        largest = max(largest, min(1.0, p[i] * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def verdict(difference: float, holm: float) -> str:
    if math.isnan(holm) or holm >= 1 - LEVEL:
        return "cannot tell"
    return "higher" if difference > 0 else "lower"


def t_interval(values: Values) -> tuple[float, float]:
    """Return the 95 % t interval of a mean; NaN for fewer than 2 values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * sd(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def bootstrap_interval(values: Values) -> tuple[float, float]:
    """Return the studentized 95 % bootstrap interval of a mean; NaN for fewer than 5 values, or without spread.

    Among bootstrap intervals, it has the right coverage for few values; percentile intervals of 5 values cover 82 %.
    Resamples with hardly any spread, a few close values drawn repeatedly, are left out: dividing by their spread would
    make intervals of 5 values up to 30 times too wide.
    """
    n = len(values)
    if n < MIN_BOOTSTRAP_VALUES or has_no_spread(values):
        return math.nan, math.nan
    samples = values[np.random.default_rng(0).integers(0, n, (RESAMPLES, n))]
    spreads = samples.std(axis=1, ddof=1)
    usable = spreads > SMALLEST_SPREAD * sd(values)
    t = (samples[usable].mean(axis=1) - mean(values)) / spreads[usable]
    low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean(values) - float(high) * sd(values), mean(values) - float(low) * sd(values)


def power(n: int, difference: float, spread: float, alpha: float) -> float:
    r"""Return the power of a paired t-test of n pairs to detect a true difference.

    $P(|T| > c) = E_Z[P(\chi^2_{n-1} < (n-1) (Z + \delta)^2 / c^2)]$ with a standard normal $Z$, by the trapezoidal
    rule: scipy's noncentral t is NaN for large $\delta$ and few degrees of freedom.
    """
    if n < 2:
        return 0.0
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = abs(difference) / spread * math.sqrt(n)
    chances = special.chdtr(n - 1, (n - 1) * ((NORMAL_GRID + shift) / critical) ** 2)
    return float(np.average(chances, weights=stats.norm.pdf(NORMAL_GRID)))


def seeds_needed(difference: float, spread: float, alpha: float = 1 - LEVEL) -> float:
    """Return the number of pairs that detect a difference with 80 % power; infinite above `MAX_SEEDS`.

    NaN if no number would, or without a spread to test against.
    """
    if math.isnan(difference) or math.isnan(alpha) or not spread > 0 or difference == 0:
        return math.nan
    low, high = 1, 2
    while power(high, difference, spread, alpha) < POWER:
        low, high = high, 2 * high
        if high > MAX_SEEDS:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, spread, alpha) >= POWER else (middle, high)
    return high


def minimum_detectable_difference(n: int, spread: float, alpha: float = 1 - LEVEL) -> float:
    """Return the minimum detectable difference at 80 % power with n pairs of the observed spread."""
    if n < 2 or math.isnan(alpha) or not spread > 0:
        return math.nan
    low, high = 0.0, spread
    while power(n, high, spread, alpha) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(n, middle, spread, alpha) >= POWER else (middle, high)
    return high


def finite_values(values: pd.Series) -> Values:
    """Return the finite values."""
    array = values.to_numpy(dtype=float)
    return array[np.isfinite(array)]


def mean(values: Values) -> float:
    return float(values.mean()) if len(values) else math.nan


def sd(values: Values) -> float:
    """Return the sample standard deviation (n − 1); NaN for fewer than 2 values."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
