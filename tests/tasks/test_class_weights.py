"""Class weights: torch's weighted cross entropy, in training only, the same for batches taken in parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from ablab.data.batch import Batch
from ablab.data.digits import Digits
from ablab.errors import ConfigError
from ablab.tasks.classification import Classification

Start = Callable[..., SimpleNamespace]
Weights = Callable[[Path], dict[str, Tensor]]


def task(**settings: Any) -> Classification:
    make = partial(torch.optim.SGD, lr=0.1)
    names = ["a", "b", "c"]
    return Classification(model=nn.Identity(), optimizer=make, scheduler=lambda *_: None, class_names=names, **settings)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_training_loss_is_the_mean_of_weighted_cross_entropies(label_smoothing: float) -> None:
    logits, targets = torch.randn(20, 3), torch.randint(3, (20,))
    weights = [0.5, 2.0, 0.0]
    weighted = task(class_weights=weights, label_smoothing=label_smoothing)
    each = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    expected = (torch.tensor(weights)[targets] * each).mean()
    torch.testing.assert_close(weighted.loss(logits, Batch(logits, targets)), expected)
    if not label_smoothing:
        total = F.cross_entropy(logits, targets, torch.tensor(weights), reduction="sum")
        torch.testing.assert_close(expected, total / 20)
    weighted.eval()
    torch.testing.assert_close(weighted.loss(logits, Batch(logits, targets)), F.cross_entropy(logits, targets))


def test_shares_of_classes_are_weighted_like_their_classes() -> None:
    logits, targets = torch.randn(20, 3), torch.randint(3, (20,))
    weighted = task(class_weights=[0.5, 2.0, 1.0])
    expected = weighted.loss(logits, Batch(logits, targets))
    mixed = F.one_hot(targets, 3).float()
    torch.testing.assert_close(weighted.loss(logits, Batch(logits, targets, mixed=mixed)), expected)


def test_balanced_weights_are_scikit_learns_of_the_training_samples() -> None:
    data = Digits(batch_size=8)
    data.setup()
    assert data.splits is not None
    targets = data.splits.train.targets  # type: ignore[attr-defined]
    sizes = {**data.task_sizes, "class_counts": data.training_class_counts()}
    make = partial(torch.optim.SGD, lr=0.1)
    balanced = Classification(
        model=nn.Identity(), optimizer=make, scheduler=lambda *_: None, class_weights="balanced", **sizes
    )
    expected = compute_class_weight("balanced", classes=np.arange(10), y=targets.numpy())
    assert balanced.class_weights is not None
    torch.testing.assert_close(balanced.class_weights, torch.tensor(expected, dtype=torch.float32))
    assert float(balanced.class_weights[targets].mean()) == pytest.approx(1)
    assert "class_weights" not in balanced.state_dict()


class TakesAny(Classification):
    """Hands its settings on, as a subclass does."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)


def test_parts_of_a_batch_add_up_and_a_subclass_that_hands_settings_on_is_weighted(
    run: Start, last_weights: Weights
) -> None:
    words = ("trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "norm=groupnorm")
    words += ("task.class_weights=balanced",)
    whole = run(*words)
    own = f"task._target_={TakesAny.__module__}.{TakesAny.__qualname__}"
    in_parts = run(*words, own, "data.micro_batch_size=12")
    plain = run(*words[:-1])
    expected = last_weights(whole.folder)
    for name, value in last_weights(in_parts.folder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, expected[name]) for name, value in last_weights(plain.folder).items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("task.class_weights=[1,2]", "10 numbers are needed, one a class, none negative, not all 0"),
        (f"task.class_weights={[-1.0] + [1.0] * 9}".replace(" ", ""), "none negative"),
        (f"task.class_weights={[0.0] * 10}".replace(" ", ""), "not all 0"),
        ("task.class_weights=blanced", "task.class_weights=blanced: "),
    ],
)
def test_weights_that_do_not_fit_are_refused(run: Start, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match="class_weights") as caught:
        run("trainer=smoke", words)
    assert message in str(caught.value)


def test_a_stream_has_no_counts(run: Start, files: Path) -> None:
    stream = ["data=hf_image", f"data.root={files}/images", "data.name=digits", "data.streaming=true"]
    with pytest.raises(ConfigError, match="class_weights=balanced: the classes of these training samples are not"):
        run("trainer=smoke", *stream, "data.val_split=validation", "task.class_weights=balanced")
