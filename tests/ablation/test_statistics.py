"""The statistics against scipy and statsmodels, on edge cases, and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from ablab.lab.ablation import statistics as st

FACTORS = ["norm", "data.batch_size"]


def grid(draw: Any, *, norms: int = 3, sizes: int = 4, seeds: int = 5) -> pd.DataFrame:
    """Runs of a made-up ablation; `draw(norm, size, seed)` is the metric."""
    return pd.DataFrame(
        {
            "norm": f"norm{norm}",
            "data.batch_size": str(2**size),
            "seed": seed,
            "status": "finished",
            "m": float(draw(norm, size, seed)),
        }
        for norm in range(norms)
        for size in range(sizes)
        for seed in range(seeds)
    )


def simulated(rng: np.random.Generator, *, effect: float = 0.0, seeds: int = 5) -> pd.DataFrame:
    """Seeds that move all norms of a batch size together, noise of each run, and perhaps an effect of every norm."""
    common = rng.normal(0, 0.02, (4, seeds))
    noise = rng.normal(0, 0.01, (3, 4, seeds))
    return grid(lambda n, b, s: 0.9 + effect * (n > 0) + common[b, s] + noise[n, b, s], seeds=seeds)


def test_a_cell_has_the_interval_that_statsmodels_gives() -> None:
    rng = np.random.default_rng(3)
    runs = grid(lambda n, b, s: rng.normal())
    for _, row in st.cells(runs, FACTORS, ["m"]).iterrows():
        values = runs[(runs["norm"] == row["norm"]) & (runs["data.batch_size"] == row["data.batch_size"])]["m"]
        theirs = DescrStatsW(values)
        assert (row["mean"], row["sd"]) == pytest.approx((values.mean(), values.std()))
        assert (row["low"], row["high"]) == pytest.approx(theirs.tconfint_mean(0.05))


def test_comparisons_are_scipys_paired_tests_with_statsmodels_correction() -> None:
    rng = np.random.default_rng(4)
    found = st.comparisons(runs := simulated(rng, effect=0.01), FACTORS, {"norm": "norm0"}, "m")
    assert len(found) == 8
    wide = runs.pivot(index="seed", columns=FACTORS, values="m")
    expected = []
    for _, row in found.iterrows():
        ours, base = (wide[(norm, row["data.batch_size"])] for norm in (row["norm"], "norm0"))
        expected.append(scipy_stats.ttest_rel(ours, base).pvalue)
        assert row["difference"] == pytest.approx((ours - base).mean())
        interval = scipy_stats.ttest_rel(ours, base).confidence_interval(0.95)
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert found["p"].to_numpy() == pytest.approx(expected)
    told, corrected, _, _ = multipletests(expected, alpha=0.05, method="holm")
    assert found["holm"].to_numpy() == pytest.approx(corrected)
    assert list(found["verdict"] != "cannot tell") == list(told)


@pytest.mark.parametrize(("effect", "alpha"), [(0.3, 0.05), (1.0, 0.05), (1.0, 0.05 / 8), (3.0, 0.05 / 8)])
def test_the_seeds_that_are_needed_are_those_of_statsmodels(effect: float, alpha: float) -> None:
    theirs = TTestPower().solve_power(effect_size=effect, alpha=alpha, power=0.8)
    assert st.seeds_needed(effect, 1.0, alpha) == math.ceil(theirs)
    for n in (5, 20):
        least = TTestPower().solve_power(nobs=n, alpha=alpha, power=0.8)
        assert st.minimum_detectable_difference(n, 2.0, alpha) == pytest.approx(2 * least, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "comparisons", "least"),
    [(2, 1, 11.5), (2, 4, 46), (2, 8, 92), (3, 12, 11.3), (3, 30, 17.9)],  # found by simulation
)
def test_few_seeds_and_many_comparisons_tell_only_huge_differences(n: int, comparisons: int, least: float) -> None:
    assert st.minimum_detectable_difference(n, 1.0, 0.05 / comparisons) == pytest.approx(least, rel=1e-2)


@pytest.mark.parametrize(("effect", "comparisons", "seeds"), [(6, 12, 4), (20, 30, 3), (40, 8, 3), (100, 8, 2)])
def test_a_huge_effect_needs_few_seeds_but_no_fewer(effect: float, comparisons: int, seeds: int) -> None:
    assert st.seeds_needed(effect, 1.0, 0.05 / comparisons) == seeds


@pytest.mark.parametrize(("n", "effect"), [(2, 400.0), (3, 20.0), (4, 1.0)])
def test_power_is_how_often_simulated_differences_are_told(n: int, effect: float) -> None:
    draws = np.random.default_rng(n).normal(effect, 1, (100_000, n))
    told = scipy_stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05 / 30
    assert st.power(n, effect, 1.0, 0.05 / 30) == pytest.approx(told.mean(), abs=0.006)


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_power_is_that_of_statsmodels_where_it_has_one(n: int) -> None:
    for effect in (0.05, 0.5, 2.0):
        theirs = TTestPower().power(effect, n, 0.01)
        assert math.isnan(theirs) or st.power(n, effect, 1.0, 0.01) == pytest.approx(theirs, abs=1e-7)


def test_a_comparison_without_a_p_takes_no_part_in_what_the_others_have_to_pass() -> None:
    rng = np.random.default_rng(0)
    runs = grid(lambda n, b, s: rng.normal(), norms=4, sizes=1)
    alone = st.comparisons(runs[runs["norm"] != "norm3"], FACTORS, {"norm": "norm0"}, "m")
    runs.loc[runs["norm"] == "norm3", "m"] = math.nan
    found = st.comparisons(runs, FACTORS, {"norm": "norm0"}, "m")
    assert found["tells"].to_list()[:2] == alone["tells"].to_list()
    assert math.isnan(found["tells"].iloc[2])


def test_a_paired_effect_is_cohens_d_with_hedges_correction() -> None:
    differences = np.array([0.1, 0.2, 0.4, 0.5])
    d = differences.mean() / differences.std(ddof=1)
    exact = math.exp(math.lgamma(1.5) - math.lgamma(1.0)) / math.sqrt(1.5)  # Hedges' J for 3 degrees of freedom
    assert st.summarize(differences)["effect"] == pytest.approx(d * exact, rel=0.01)


def test_a_run_without_a_partner_is_lost_and_counted() -> None:
    runs = simulated(np.random.default_rng(0))
    runs.loc[(runs["norm"] == "norm1") & (runs["seed"] == 2), ["status", "m"]] = ["diverged", math.nan]
    runs.loc[(runs["norm"] == "norm0") & (runs["seed"] == 3), "status"] = "failed"
    found = st.comparisons(runs, FACTORS, {"norm": "norm0"}, "m").set_index(FACTORS)
    assert (found.loc[("norm1", "1"), "n"], found.loc[("norm1", "1"), "lost"]) == (3, 2)
    assert (found.loc[("norm2", "1"), "n"], found.loc[("norm2", "1"), "lost"]) == (4, 1)
    counts = st.cells(runs, FACTORS, ["m"]).set_index(FACTORS)
    assert (counts.loc[("norm1", "1"), "diverged"], counts.loc[("norm0", "1"), "failed"]) == (1, 1)


EDGES = {
    "nobody finished": (lambda n, b, s: math.nan, 0, "cannot tell"),
    "all the same": (lambda n, b, s: 0.5, 5, "cannot tell"),
    "the same difference with every seed": (lambda n, b, s: 0.5 + n + s, 5, "cannot tell"),
}


@pytest.mark.parametrize("name", EDGES)
def test_what_has_no_spread_is_judged_without_a_warning(name: str) -> None:
    draw, n, verdict = EDGES[name]
    found = st.comparisons(grid(draw), FACTORS, {"norm": "norm0"}, "m")
    assert set(found["n"]) == {n}
    assert set(found["verdict"]) == {verdict}


def test_one_seed_tells_nothing() -> None:
    found = st.comparisons(grid(lambda n, b, s: n, seeds=1), FACTORS, {"norm": "norm0"}, "m")
    assert set(found["verdict"]) == {"cannot tell"}
    assert found["p"].isna().all()
    assert found["tells"].isna().all()


def test_a_whole_cell_can_be_the_baseline_and_a_missing_one_is_none() -> None:
    runs = simulated(np.random.default_rng(0))
    assert len(st.comparisons(runs, FACTORS, {"norm": "norm0", "data.batch_size": "1"}, "m")) == 11
    assert st.comparisons(runs, FACTORS, {}, "m").empty
    part = runs[(runs["norm"] != "norm0") | (runs["data.batch_size"] == "1")]
    assert len(st.comparisons(part, FACTORS, {"norm": "norm0"}, "m")) == 2


@pytest.mark.parametrize("ablations", [300, pytest.param(1000, marks=pytest.mark.thorough)])
def test_without_an_effect_a_difference_is_called_in_at_most_six_of_a_hundred_ablations(ablations: int) -> None:
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(ablations):
        differences = rng.normal(0, 0.01, (8, 5)) + rng.normal(0, 0.01, (1, 5))  # of one baseline: they hang together
        p = np.array([st.p_value(row) for row in differences])
        called += bool((st.holm(p) < 0.05).any())
    assert called / ablations <= 0.06
    whole = sum(
        (st.comparisons(simulated(rng), FACTORS, {"norm": "norm0"}, "m")["verdict"] != "cannot tell").any()
        for _ in range(ablations // 10)
    )
    assert whole <= 0.12 * ablations / 10, "the report's own path, by fewer"


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("step", "spread"), [(10, 7.0), (10, 2.0), (1 / 360, 0.002)])
def test_a_metric_with_few_values_is_not_called_for_its_ties(n: int, step: float, spread: float) -> None:
    rng = np.random.default_rng(n)
    ours, theirs = (np.round(rng.normal(40 * step, spread, (20_000, n)) / step) * step for _ in range(2))
    rows, counts = np.unique(ours - theirs, axis=0, return_counts=True)  # most differences are the same few
    assert np.average([st.p_value(row) < 0.05 for row in rows], weights=counts) <= 0.06


def test_equal_differences_are_no_verdict_though_float32_rounds_them() -> None:
    correct = {0: [323, 320, 311], 1: [324, 321, 312]}
    runs = grid(lambda n, b, s: np.float32(correct[n][s]) / np.float32(360), norms=2, sizes=1, seeds=3)
    [row] = [row for _, row in st.comparisons(runs, FACTORS, {"norm": "norm0"}, "m").iterrows()]
    assert row["difference"] == pytest.approx(1 / 360, rel=1e-4)
    assert (row["n"], row["verdict"]) == (3, "cannot tell")
    assert all(math.isnan(row[name]) for name in ("p", "holm", "low", "high", "seeds_needed", "tells"))


@pytest.mark.parametrize(
    ("interval", "n"),
    [(st.t_interval, 3), (st.t_interval, 5), (st.bootstrap_interval, 5), (st.bootstrap_interval, 10)],
)
def test_intervals_cover_the_true_difference_as_often_as_they_say(interval: Any, n: int) -> None:
    rng = np.random.default_rng(n)
    found = [interval(rng.normal(0.01, 0.02, n)) for _ in range(3000)]
    assert 0.93 <= np.mean([low <= 0.01 <= high for low, high in found]) <= 0.97


def test_a_bootstrap_interval_of_too_few_is_none() -> None:
    assert all(map(math.isnan, st.bootstrap_interval(np.array([0.1, 0.2, 0.3, 0.5]))))
