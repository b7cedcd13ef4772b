"""The gradient's noise against what linear regression says it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ablab.callbacks.diagnostics.diagnostic import TaskCopy, split_batch
from ablab.callbacks.diagnostics.gradient_noise import estimate_noise
from ablab.data.batch import Batch
from ablab.lab.loggers.csv_file import read_rows

Make = Callable[[nn.Module], TaskCopy]
Draw = Callable[..., Batch]


@pytest.fixture
def linear(copy_task: Make) -> TaskCopy:
    """A linear model without bias, away from the solution 1, by d = (0.5, −0.5, 1)."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    copy = copy_task(model)
    copy.add_to_weights(torch.tensor([1.5, 0.5, 2.0], dtype=torch.float64))
    return copy


def truth() -> tuple[float, float]:
    """tr(Σ) and |G|² of g = x (x·d − ε) with x of variances 1, 4, 9: E|x|²(x·d)² = tr S dᵀSd + 2 dᵀS²d."""
    s, d = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.5, -0.5, 1.0])
    squared_norm = float((s * d).square().sum())
    second = float(s.sum() * (s * d * d).sum() + 2 * (s * s * d * d).sum() + s.sum())
    return second - squared_norm, squared_norm


def test_of_single_samples_it_is_the_covariance_of_their_gradients(linear: TaskCopy, samples: Draw) -> None:
    batch = samples(40)
    weights = linear.parameters[0].detach()
    gradients = batch.inputs * (batch.inputs @ weights.T - batch.targets)
    variance, squared_norm = estimate_noise(linear, split_batch(batch, 1))
    trace = float(torch.cov(gradients.T).trace())
    assert variance == pytest.approx(trace, rel=1e-10)
    assert squared_norm == pytest.approx(float(gradients.mean(0).square().sum()) - trace / 40, rel=1e-10)


@pytest.mark.parametrize("size", [1, 5, 50])
def test_from_groups_of_any_size_it_is_the_analytic_covariance(linear: TaskCopy, samples: Draw, size: int) -> None:
    variance, squared_norm = estimate_noise(linear, split_batch(samples(200 * size, seed=size), size))
    true_variance, true_squared_norm = truth()
    spread = math.sqrt(2 / 200) * 2  # a chi-squared's, of one direction; single samples have heavier tails
    assert variance == pytest.approx(true_variance, rel=4 * spread if size == 1 else 2 * spread)
    assert squared_norm == pytest.approx(true_squared_norm, rel=0.35)


def test_the_squared_norm_is_estimated_without_bias(linear: TaskCopy, samples: Draw) -> None:
    true_variance, true_squared_norm = truth()
    found = [estimate_noise(linear, split_batch(samples(8, seed=seed), 1)) for seed in range(200)]
    mean = sum(squared_norm for _, squared_norm in found) / len(found)
    plain = mean + sum(variance for variance, _ in found) / len(found) / 8  # |ḡ|² as it is
    assert mean == pytest.approx(true_squared_norm, rel=0.25)
    assert plain > true_squared_norm + 0.5 * true_variance / 8


def test_the_variance_of_a_batch_falls_as_one_over_its_size(linear: TaskCopy, samples: Draw) -> None:
    sizes = [1, 4, 16]
    batch = samples(1600)
    variances = [estimate_noise(linear, split_batch(batch, size))[0] / size for size in sizes]
    x, y = torch.tensor(sizes).double().log(), torch.tensor(variances).double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-1, abs=0.1)


def test_it_is_the_estimate_of_the_paper_from_two_batch_sizes(linear: TaskCopy, samples: Draw) -> None:
    batch, small, big = samples(24), 3, 24
    _, whole = linear.gradient([batch])
    parts = [linear.gradient([part])[1].square().sum() for part in split_batch(batch, small)]
    g_big, g_small = float(whole.square().sum()), float(sum(parts)) / len(parts)
    variance, squared_norm = estimate_noise(linear, split_batch(batch, small))
    assert squared_norm == pytest.approx((big * g_big - small * g_small) / (big - small), rel=1e-10)
    assert variance == pytest.approx((g_small - g_big) / (1 / small - 1 / big), rel=1e-10)


def test_a_run_logs_the_variance_of_its_own_batch(run: Callable[..., SimpleNamespace]) -> None:

    found = {}
    for norm in ("batchnorm", "groupnorm"):
        done = run("+callbacks/measure=gradient_noise", f"norm={norm}", "data.batch_size=16")
        row = read_rows(done.folder)[0]
        found[norm] = row
        variance = found[norm]["gradient/variance"]
        assert found[norm]["gradient/batch_variance"] == pytest.approx(variance / 16, rel=1e-12)
        assert found[norm]["gradient/noise_scale"] == pytest.approx(variance / found[norm]["gradient/squared_norm"])
