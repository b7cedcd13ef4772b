"""Santurkar et al.'s measure against a network whose gradients can be written down."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.callbacks.diagnostics.covariate_shift import CovariateShift, gradient_shift, group_by_layer
from ablab.callbacks.diagnostics.diagnostic import TaskCopy, split_batch
from ablab.data.batch import Batch
from ablab.lab.loggers.csv_file import read_rows

Make = Callable[[nn.Module], TaskCopy]
Draw = Callable[..., Batch]


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().double() for name, p in model.named_parameters()}


def test_it_is_what_the_definition_says(copy_task: Make, samples: Draw, model: nn.Sequential) -> None:
    batch = samples(10)
    after = {name: w + 0.1 * torch.randn_like(w) for name, w in weights(model).items()}

    def gradient(layer: int, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        x, y = batch.inputs, batch.targets
        error = (x @ first.T @ second.T @ third.T - y) / len(x)
        return (third.T @ error.T @ x @ first.T) if layer == 1 else (error.T @ x @ first.T @ second.T)

    w, v = list(weights(model).values()), list(after.values())
    pairs = {1: (gradient(1, *w), gradient(1, v[0], w[1], w[2])), 2: (gradient(2, *w), gradient(2, v[0], v[1], w[2]))}
    found = gradient_shift(copy_task(model), split_batch(batch, 4), after)
    for layer, (g, h) in pairs.items():
        assert found[f"covariate_shift/distance/{layer}"] == pytest.approx(float((g - h).norm()), rel=1e-10)
        cosine = float((g * h).sum() / g.norm() / h.norm())
        assert found[f"covariate_shift/cosine/{layer}"] == pytest.approx(cosine, rel=1e-10)
    mean = sum(found[f"covariate_shift/distance/{layer}"] for layer in (1, 2)) / 2
    assert found["covariate_shift/distance"] == pytest.approx(mean)
    assert "covariate_shift/distance/0" not in found, "it has none below it"


def test_nothing_shifts_if_the_layers_below_stay(copy_task: Make, samples: Draw, model: nn.Sequential) -> None:
    after = weights(model)
    after["2.weight"] += 1.0  # above all others
    found = gradient_shift(copy_task(model), [samples(10)], after)
    assert {value for name, value in found.items() if "distance" in name} == {0.0}
    assert [value for name, value in found.items() if "cosine" in name] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (
            ["norm=batchnorm"],
            ["conv1", "blocks.0.convs.0", "blocks.0.convs.1", "blocks.1.convs.0", "blocks.1.convs.1"],
        ),
        (
            ["model=transformer", "norm=weightnorm", "model.num_layers=1"],
            [
                "embed",
                "positions",
                *(f"blocks.0.{n}" for n in ("attention.qkv", "attention.proj", "expand", "contract")),
            ],
        ),
        (["model=rnn"], ["layers.0.0.input", "layers.0.0.recurrent", "head"]),
    ],
)
def test_layers_come_in_the_order_of_the_forward_pass_with_all_parameters(
    config: Callable[..., Any], words: list[str], order: list[str]
) -> None:
    from ablab.lab.train import assemble

    parts = assemble(config(*words, "callbacks.samples=null"))
    batch = parts.data.example(1)
    stages = group_by_layer(parts.task.model, lambda: parts.task(batch))
    assert [name for name, _, _ in stages][: len(order)] == order
    listed = [id(p) for _, _, together in stages for p in together]
    assert sorted(listed) == sorted(map(id, parts.task.model.parameters())), "each exactly once"


def test_of_a_run_it_is_zero_without_steps_and_not_with(run: Callable[..., SimpleNamespace]) -> None:
    for lr in (0, 0.01):
        done = run("+callbacks/measure=covariate_shift", "model=rnn", "model.dropout=0.3", f"optimizer.lr={lr}")
        rows = [row for row in read_rows(done.folder) if "covariate_shift/distance" in row]
        assert [row["step"] for row in rows] == [0]
        distances = [v for n, v in rows[0].items() if n.startswith("covariate_shift/distance/")]
        assert len(distances) == 2
        assert all((value > 0) == (lr > 0) for value in distances)


def test_a_model_of_one_layer_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(ValueError, match="Linear has a single layer with weights, and none below it; leave Covariate"):
        CovariateShift().check(nothing, nn.Linear(2, 2), 1)
