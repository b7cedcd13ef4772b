"""Lengths and turns of weights, against what scale invariance and plain gradient descent say they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ablab.callbacks.diagnostics.weight_norms import WeightNorms, angle, trained_weights
from ablab.lab.loggers.csv_file import read_rows

Start = Callable[..., SimpleNamespace]
PLAIN = ["optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "scheduler=constant"]


def measured(run: Start, *words: str) -> list[dict[str, Any]]:
    few = ["trainer.max_steps=3", "trainer.limit_train_batches=3", "callbacks.weights.every_n_steps=1"]
    done = run("+callbacks/measure=weights", *few, *words)
    return [row for row in read_rows(done.folder) if "weights/norm" in row]


def test_before_a_batch_norm_weights_grow_and_turn_as_their_gradient_says(run: Start) -> None:
    lr = 0.5
    rows = measured(run, *PLAIN, f"optimizer.lr={lr}")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for layer in ("conv1", "blocks.1.shortcut.0"):
        for now, then in pairwise(rows):
            norm, gradient = now[f"weights/norm/{layer}"], now[f"weights/gradient_norm/{layer}"]
            step = lr * gradient  # at a right angle: the loss does not depend on the length
            assert then[f"weights/norm/{layer}"] == pytest.approx(math.hypot(norm, step), rel=1e-5)
            assert now[f"weights/angular_update/{layer}"] == pytest.approx(math.atan(step / norm), rel=1e-3)
            assert now[f"weights/effective_lr/{layer}"] == pytest.approx(lr / norm**2, rel=1e-12)


def test_under_weight_norm_it_is_the_direction_that_is_measured(run: Start) -> None:
    lr = 0.5
    rows = measured(run, *PLAIN, "norm=weightnorm", f"optimizer.lr={lr}")
    for now, then in pairwise(rows):
        step = lr * now["weights/gradient_norm/conv1"]
        assert then["weights/norm/conv1"] == pytest.approx(math.hypot(now["weights/norm/conv1"], step), rel=1e-5)


def test_weights_of_length_zero_have_no_direction(run: Start) -> None:
    [first, *_] = measured(run, "norm=none")
    assert first["weights/norm/blocks.0.convs.1"] == 0
    assert "weights/effective_lr/blocks.0.convs.1" not in first
    assert "weights/angular_update/blocks.0.convs.1" not in first
    assert first["weights/effective_lr/conv1"] > 0


@pytest.mark.parametrize("turn", [1e-9, 1e-4, 1.0, 3.0])
def test_angles_are_exact_however_small(turn: float) -> None:
    a = torch.tensor([2.0, 0.0], dtype=torch.float64)
    b = 5 * torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    assert angle(a, b) == pytest.approx(turn, rel=1e-9)


def test_the_direction_is_what_is_learned_of_a_reparametrized_weight() -> None:
    parametrizations = nn.utils.parametrizations
    plain, weight, spectral = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3)
    model = nn.Sequential(plain, parametrizations.weight_norm(weight), parametrizations.spectral_norm(spectral))
    found = trained_weights(model)
    chains: list[Any] = [module.parametrizations.weight for module in (weight, spectral)]
    assert [*map(id, found.values())] == [id(plain.weight), id(chains[0].original1), id(chains[1].original)]


def test_a_model_without_weights_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(ValueError, match="ReLU has no layer with a weight that is trained; leave WeightNorms out"):
        WeightNorms().check(nothing, nn.ReLU(), 1)
