"""What leaves a norm, and the gap between train and eval, where both are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ablab.callbacks.diagnostics.norm_statistics import OutputMoments
from ablab.lab.loggers.csv_file import read_rows
from ablab.norms import BatchNorm, GroupNorm, LayerNorm, NormLayer

Start = Callable[..., SimpleNamespace]
SUMMARY = ("values", "mean", "std", "std_spread", "train_loss", "eval_loss", "loss_gap", "logits_gap")


def measured(run: Start, *words: str) -> list[dict[str, Any]]:
    done = run("+callbacks/measure=norms", "callbacks.norms.num_samples=64", *words)
    return [row for row in read_rows(done.folder) if "norms/loss_gap" in row]


def test_after_batch_norm_features_have_one_mean_and_one_spread_and_eval_differs(run: Start) -> None:
    for row in measured(run, "norm=batchnorm"):
        assert row["norms/mean"] < 1e-5
        assert row["norms/std"] == pytest.approx(1, abs=1e-3)
        assert row["norms/std_spread"] < 1e-3
        assert row["norms/values/norm1"] == 32 * 64
        assert row["norms/logits_gap"] > 0.01
        assert row["norms/loss_gap"] == pytest.approx(row["norms/eval_loss"] - row["norms/train_loss"], abs=1e-12)
        assert row["norms/loss_gap"] != 0


@pytest.mark.parametrize("words", [["norm=layernorm"], ["norm=groupnorm"], ["model=rnn", "model.dropout=0.5"]])
def test_without_running_averages_train_and_eval_agree(run: Start, words: list[str]) -> None:
    for row in measured(run, *words):
        assert row["norms/logits_gap"] == row["norms/loss_gap"] == 0
        assert row["norms/mean"] > 0.01
        assert row["norms/std_spread"] > 0.01


@pytest.mark.parametrize("norm", ["none", "weightnorm"])
def test_without_norm_layers_there_is_the_gap_alone(run: Start, norm: str) -> None:
    for row in measured(run, f"norm={norm}"):
        assert {name.partition("/")[2] for name in row if name.startswith("norms/")} == set(SUMMARY[-4:])


def watched(layer: nn.Module, x: torch.Tensor, valid: torch.Tensor | None = None) -> OutputMoments:
    assert isinstance(layer, NormLayer)
    found = OutputMoments(layer)
    found((x, valid), {})
    return found


def test_gain_and_shift_and_nonlinearity_are_left_out() -> None:
    layer: Any = LayerNorm()(6, "sequence", activation=nn.ReLU())
    nn.init.constant_(layer.weight, 3.0)
    nn.init.constant_(layer.bias, 7.0)
    x = torch.randn(4, 5, 6)
    found = watched(layer, x)
    y = nn.functional.layer_norm(x, (6,)).double().flatten(0, 1)
    torch.testing.assert_close(found.mean, y.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.std, y.std(0, correction=0), rtol=1e-5, atol=1e-6)
    assert found.num_values == 6
    assert float(layer.weight.detach()[0]) == 3


def test_padding_is_left_out() -> None:
    layer = BatchNorm()(3, "sequence")
    x, valid = torch.randn(4, 5, 3), torch.arange(5).expand(4, 5) < 3
    found = watched(layer, torch.where(valid[..., None], x, 1e6), valid)
    assert found.count == 12
    torch.testing.assert_close(found.std, torch.ones(3).double(), rtol=1e-3, atol=1e-3)
    assert float(found.mean.abs().max()) < 1e-6


def test_each_step_of_a_recurrence_counts() -> None:
    layer: Any = BatchNorm().recurrent(3, "recurrent", num_steps=4)
    found = OutputMoments(layer)
    for step in range(4):
        found((torch.randn(8, 3) + step,), {"step": step})
    assert found.count == 32
    assert float(found.mean.abs().max()) < 1e-6
    assert found.num_values == 8
    assert float(layer.running_mean.abs().max()) == 0, "the layer itself stays as it is"


def test_the_features_lie_where_the_layout_has_them() -> None:
    x = torch.randn(2, 4, 3, 5)
    found = watched(GroupNorm(num_groups=2)(4, "image"), x)
    y = nn.functional.group_norm(x, 2).double().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(found.mean, y.mean(0), rtol=1e-5, atol=1e-6)
    assert found.num_values == 2 * 15
