"""Data with labels: what the parts share, contradict or lack is said before the training."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor

from ablab.data.batch import Kind, Samples
from ablab.data.digits import load_digits
from ablab.data.labelled import LabelledData, OfficialSplits, group_duplicates, stratified_holdout


def images(*values: int) -> Tensor:
    """An image of one value for each."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


class Given(LabelledData):
    """Parts that a test has made."""

    kind: ClassVar[Kind] = "images"
    class_names: ClassVar[list[str]] = ["a", "b", "c"]  # type: ignore[misc]

    def __init__(self, official: OfficialSplits, **settings: Any) -> None:
        super().__init__(batch_size=1, **settings)
        self.official = official

    def load(self) -> OfficialSplits:
        return self.official

    @property
    def model_sizes(self) -> dict[str, int]:
        return {}


def part(*values: int, targets: list[int] | None = None) -> Samples:
    return Samples(images(*values), torch.tensor(targets or [value % 3 for value in values]))


def caveats(train: Samples, test: Samples, val: Samples | None = None, **settings: Any) -> list[str]:
    data = Given(OfficialSplits(train, test, val), **settings)
    data.setup()
    return data.caveats()


def test_ordinary_parts_have_nothing_to_report() -> None:
    assert caveats(part(*range(30)), part(30, 31, 32)) == []
    assert caveats(part(*range(30), 0, 1, 1), part(30, 31, 32)) == []  # copies within training are ordinary


def test_test_samples_that_are_training_or_validation_samples_are_counted() -> None:
    train, test, val = part(*range(12)), part(0, 0, 3, 20, 21, 22), part(12, 13, 14, 22, 5)
    assert caveats(train, test, val)[1:] == [
        "3 of 6 test samples are training samples too",
        "1 of 6 test samples are validation samples too",
        "1 of 5 validation samples are training samples too",
    ]


def test_test_samples_that_are_also_in_the_held_out_part_are_counted() -> None:
    found = caveats(part(*range(30)), part(*range(30)), val_fraction=0.2)
    assert found == [
        "24 of 30 test samples are training samples too",
        "6 of 30 test samples are validation samples too",
    ]


def test_samples_with_contradicting_labels_are_counted() -> None:
    train = part(*range(9), 40, 40, targets=[*([0, 1, 2] * 3), 0, 1])
    test = part(7, 50, 51, 52, targets=[2, 0, 1, 2])
    assert caveats(train, test, val_fraction=0) == [
        "1 of 4 test samples are training samples too",
        "4 samples have the inputs of another one and a different label",
    ]


def test_classes_that_a_part_lacks_are_named() -> None:
    train, val, test = part(*range(12)), part(12, 15), part(31)
    assert caveats(train, test, val)[1:] == [
        "no validation sample has the class b, c",
        "no test sample has the class a, c",
    ]


def test_equal_inputs_of_other_lengths_are_other_samples() -> None:
    inputs = torch.zeros(3, 4, 1)
    valid = torch.tensor([[True, False, False, False], [True, True, False, False], [True, True, False, False]])
    digests = Samples(inputs, torch.zeros(3, dtype=torch.int64), valid).digests
    assert digests[0] != digests[1]
    assert digests[1] == digests[2]


def test_contents_are_numbered_by_their_first_sample() -> None:
    first, group = group_duplicates(torch.tensor([9, -4, 9, 7, -4, 1]))
    assert first.tolist() == [0, 1, 3, 5]
    assert group.tolist() == [0, 1, 0, 2, 1, 3]


def test_parts_of_parts_keep_the_digests_of_their_samples() -> None:
    whole = part(3, 1, 2, 3)
    digests = whole.digests
    inner = whole.part(torch.tensor([3, 0, 1])).part(torch.tensor([2, 0]))
    assert torch.equal(inner.digests, digests[[1, 3]])
    assert digests[0] == digests[3] != digests[1]


@pytest.mark.parametrize("choice", ["digits", "japanese_vowels"])
def test_a_run_on_the_shipped_data_reports_nothing(run: Callable[..., SimpleNamespace], choice: str) -> None:
    model = ["model=rnn"] if choice == "japanese_vowels" else []
    lines = run(f"data={choice}", *model).printed.splitlines()
    [line] = [line for line in lines if line.startswith("data: ")]
    assert ";" not in line


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_held_out_samples_are_those_that_scikit_learn_draws(counts: list[int], fraction: float, seed: int) -> None:
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed % 1000))]
    try:
        kept, held_out = stratified_holdout(targets, fraction, seed)
    except ValueError:
        return
    expected = train_test_split(np.arange(len(targets)), test_size=fraction, stratify=targets, random_state=seed)
    assert [kept.tolist(), held_out.tolist()] == [sorted(part.tolist()) for part in expected]


def test_the_digits_are_those_of_scikit_learn() -> None:
    images, targets = load_digits()
    bunch = datasets.load_digits()
    assert torch.equal(images, torch.as_tensor(bunch.images, dtype=torch.uint8))
    assert torch.equal(targets, torch.as_tensor(bunch.target, dtype=torch.long))
