"""Drift against moves of a layer's inputs that are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ablab.callbacks.diagnostics.activation_drift import distributions, drift, feature_rows
from ablab.callbacks.diagnostics.diagnostic import TaskCopy, split_batch
from ablab.data.batch import Batch
from ablab.lab.loggers.csv_file import read_rows

Make = Callable[[nn.Module], TaskCopy]
Draw = Callable[..., Batch]


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def test_what_does_not_move_does_not_drift(copy_task: Make, samples: Draw, model: nn.Sequential) -> None:
    batches = split_batch(samples(20), 8)
    found = [distributions(copy_task(model), batches, 100) for _ in range(2)]
    assert [*found[0]] == ["1"], "the first layer sees the data"
    assert drift(found[0]["1"], found[1]["1"]) == (0.0, 0.0, 0.0)


def test_a_shift_moves_mean_and_distance_and_not_the_spread(
    copy_task: Make, samples: Draw, model: nn.Sequential
) -> None:
    batches = split_batch(samples(20), 8)
    before = distributions(copy_task(model), batches, 100)["1"]
    by = torch.tensor([0.3, -0.1, 0.0, 0.2])
    with torch.no_grad():
        model[0].bias.add_(by)
    after = distributions(copy_task(model), batches, 100)["1"]
    expected = float((by.double().abs() / before["std"]).mean())
    mean, std, distance = drift(before, after) or (0, 0, 0)
    assert (mean, distance) == pytest.approx((expected, expected), rel=1e-5)
    assert std == pytest.approx(0, abs=1e-6)


def test_a_scale_moves_the_spread_by_its_share(copy_task: Make, samples: Draw, model: nn.Sequential) -> None:
    batches = split_batch(samples(20), 8)
    nn.init.zeros_(model[0].bias)
    before = distributions(copy_task(model), batches, 100)["1"]
    with torch.no_grad():
        model[0].weight.mul_(1.25)
    after = distributions(copy_task(model), batches, 100)["1"]
    mean, std, distance = drift(before, after) or (0, 0, 0)
    assert std == pytest.approx(0.25, rel=1e-6)
    assert mean == pytest.approx(float((0.25 * before["mean"].abs() / before["std"]).mean()), rel=1e-6)
    assert distance == pytest.approx(float((0.25 * before["values"].abs().mean(0) / before["std"]).mean()), rel=1e-5)


def test_mean_and_standard_deviation_are_of_all_values(copy_task: Make, samples: Draw, model: nn.Sequential) -> None:
    batch = samples(50)
    found = distributions(copy_task(model), split_batch(batch, 8), 14)["1"]
    inputs = model.double()[0](batch.inputs).detach()
    torch.testing.assert_close(found["mean"], inputs.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["std"], inputs.std(0, correction=0), rtol=1e-12, atol=0)
    assert found["values"].shape == (14, 4)
    assert (found["values"].diff(dim=0) >= 0).all()


def test_features_that_were_constant_are_left_out() -> None:
    earlier = {"mean": torch.zeros(2), "std": torch.tensor([1.0, 0.0]), "values": torch.zeros(3, 2)}
    now = {"mean": torch.tensor([0.5, 9.0]), "std": torch.tensor([1.5, 9.0]), "values": torch.full((3, 2), 0.25)}
    assert drift(earlier, now) == (0.5, 0.5, 0.25)
    assert drift({**earlier, "std": torch.zeros(2)}, now) is None


def test_padding_is_left_out_and_a_token_put_before_is_not() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    linear = nn.Linear(3, 3)
    assert torch.equal(feature_rows(x, linear, valid), torch.cat([x[0, :3], x[1, :2]]))
    assert torch.equal(feature_rows(x[:, 1:], linear, valid), torch.cat([x[0, 1:3], x[1, 1:2]]))
    assert torch.equal(feature_rows(x[:, 0], linear, valid), x[:, 0])
    image = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(feature_rows(image, nn.Conv2d(2, 1, 1), None), image[0].flatten(1).T)


def test_a_run_that_does_not_learn_does_not_drift(run: Callable[..., SimpleNamespace]) -> None:
    words = ["trainer.max_steps=4", "trainer.limit_train_batches=4", "+callbacks/measure=drift"]
    words += ["callbacks.drift.every_n_steps=2", "callbacks.drift.num_samples=64"]
    found = {}
    for lr in (0, 0.1):
        done = run(*words, f"optimizer.lr={lr}")
        rows = [row for row in read_rows(done.folder) if "drift/mean" in row]
        assert [row["step"] for row in rows] == [2, 4], "the first has nothing to be compared with"
        found[lr] = [v for row in rows for n, v in row.items() if n.startswith("drift/")]
    assert len(found[0]) == 2 * 3 * 10, "nine layers and their mean"
    assert set(found[0]) == {0.0}
    assert min(found[0.1]) > 0
