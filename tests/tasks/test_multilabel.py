"""Multi-label classification: the loss and the metrics by other libraries' formulas, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score
from torch import nn

from ablab.data.batch import Batch
from ablab.tasks.multilabel import MultiLabel


def task(number: int) -> MultiLabel:
    names = [f"label {i}" for i in range(number)]
    make = partial(torch.optim.SGD, lr=0.1)
    return MultiLabel(model=nn.Identity(), optimizer=make, scheduler=lambda *_: None, label_names=names)


def compute_metrics(of: MultiLabel, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    for rows in (slice(0, 30), slice(30, None)):
        batch = Batch(logits[rows], targets[rows])
        if len(batch.targets):
            of.update(of.metrics("val"), batch.inputs, of.loss(batch.inputs, batch), batch)
    return {name: float(value) for name, value in of.compute_metrics("val").items()}


def test_metrics_are_scikit_learns() -> None:
    targets = (torch.rand(200, 3) < torch.tensor([0.2, 0.5, 0.8])).float()
    logits = targets + torch.randn(200, 3)
    found = compute_metrics(task(3), logits, targets)
    assert found["val/loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(logits, targets)), rel=1e-5)
    assert found["val/f1"] == pytest.approx(f1_score(targets, logits > 0, average="macro"), rel=1e-5)
    exact = average_precision_score(targets, logits.sigmoid(), average="macro")
    assert found["val/average_precision"] == pytest.approx(exact, abs=0.01)  # at 200 thresholds


def test_a_label_that_no_sample_has_is_left_out_of_the_mean() -> None:
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    logits = torch.tensor([[2.0, 1.0], [-1.0, 0.0], [1.0, -1.0]])
    assert compute_metrics(task(2), logits, targets)["val/average_precision"] == pytest.approx(1.0)
    assert "val/average_precision" not in compute_metrics(task(2), logits, torch.zeros(3, 2))


def test_a_network_learns_several_labels_of_a_table(run: Callable[..., SimpleNamespace], files: object) -> None:
    words = ("trainer=cpu", "model=mlp", "data=table_labels", "trainer.max_epochs=5")
    features = "data.features=[age,bmi,bp,s1,s2,s3]"
    done = run(*words, f"data.train_file={files}/table.csv", "data.target=[is_old,is_heavy]", features)
    assert done.metrics["test/average_precision"] > 0.9
    assert done.metrics["test/f1"] > 0.8
    assert set(done.metrics) == {"val/loss", "test/loss", "test/average_precision", "test/f1"}
