"""Precise batch statistics in a real run: the test sees them, the checkpoint does not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from ablab.callbacks.recalibration import Recalibration
from ablab.lab.run.checkpoint_files import BEST, read_weights

WORDS = ("trainer.limit_train_batches=4", "trainer.max_steps=4", "trainer.limit_test_batches=1.0", "optimizer.lr=0.3")


def test_the_test_is_done_with_statistics_of_training_data(run: Callable[..., SimpleNamespace]) -> None:
    plain, precise = run(*WORDS), run(*WORDS, "callbacks=recalibration")
    assert plain.metrics["val/accuracy"] == precise.metrics["val/accuracy"]
    # after four steps the moving averages are still mostly what they began with
    assert precise.metrics["test/loss"] < plain.metrics["test/loss"]
    weights = [read_weights(r.folder / "checkpoints" / BEST) for r in (plain, precise)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_norms_without_averages_are_not_touched(run: Callable[..., SimpleNamespace]) -> None:
    assert run(*WORDS, "norm=layernorm").metrics == run(*WORDS, "norm=layernorm", "callbacks=recalibration").metrics


def test_no_batches_are_too_few() -> None:
    with pytest.raises(ValueError, match="num_batches=0: at least one is needed"):
        Recalibration(num_batches=0)
