"""The dry run tries a batch through the model and the task's loss, whatever code these are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ablab.data.batch import Batch
from ablab.errors import ConfigError
from ablab.tasks.classification import Classification

Start = Callable[..., SimpleNamespace]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


def in_tests(group: str, kind: type) -> tuple[str, ...]:
    return ("norm=none", f"{group}._target_=tests.test_dry_run.{kind.__name__}")


class Linear(nn.Module):
    """Reads anything as a vector."""

    def __init__(self, *, num_classes: int, norm: Any = None, **sizes: Any) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.flatten(1))


class LooksAtAValue(Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs if float(inputs.mean()) < 1e9 else -inputs)


class ReadsSequencesToo(Linear):
    takes: ClassVar = ("sequences",)  # it says so, and reads images as well


class TooFewLogits(Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)[:-1]


class BrokenLoss(Classification):
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits @ batch.targets


class LossThatLooksAtAValue(Classification):
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = super().loss(logits, batch)
        return loss if loss.item() < 1e9 else -loss


def model_words(kind: type) -> tuple[str, ...]:
    own = (f"~model.{key}" for key in ("style", "depth", "width", "zero_init_residual"))
    return ("model=resnet", *own, *in_tests("model", kind))


@pytest.mark.parametrize("kind", [Linear, LooksAtAValue, ReadsSequencesToo])
def test_any_model_that_can_read_the_data_trains(run: Start, kind: type) -> None:
    assert run(*model_words(kind)).metrics["test/loss"] > 0


def test_a_loss_that_looks_at_a_value_is_tried_on_a_real_batch(run: Start) -> None:
    assert run(*in_tests("task", LossThatLooksAtAValue)).metrics["test/loss"] > 0


def test_a_trial_on_a_real_batch_changes_no_weight(run: Start, last_weights: Callable[..., Any]) -> None:
    one, other = (run(*model_words(kind)).folder for kind in (Linear, LooksAtAValue))
    assert all(torch.equal(value, last_weights(other)[name]) for name, value in last_weights(one).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            model_words(TooFewLogits),
            r"task: the loss of Classification fails on a batch of Digits \(.*\); it was given \(31, 10\) from "
            r"TooFewLogits, targets \(32,\)",
        ),
        (in_tests("task", BrokenLoss), r"task: the loss of BrokenLoss fails on a batch of Digits \(.*\); it was given"),
    ],
)
def test_a_loss_that_fails_is_told_before_anything_is_written(
    run: Start, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words)
    assert not list(tmp_path.glob("runs/*"))


def test_it_can_be_turned_off(run: Start) -> None:
    with pytest.raises((RuntimeError, ValueError), match="batch"):
        run(*model_words(TooFewLogits), "dry_run=false")
