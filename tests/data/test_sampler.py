"""The order of the samples: the same for the same seed and epoch, on any number of processes, from any batch on."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.data.sampler import BatchSampler, FewClassesSampler


@settings(max_examples=50)
@given(num=st.integers(8, 60), size=st.sampled_from([4, 8]), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_the_same_samples_make_up_each_global_batch_on_any_number_of_processes(
    num: int, size: int, seed: int, epoch: int
) -> None:
    def batches(world_size: int) -> list[set[int]]:
        orders = [
            BatchSampler(num, batch_size=size, shuffle=True, seed=seed, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for order in orders:
            order.epoch = epoch
        return [set().union(*parts) for parts in zip(*orders, strict=True)]

    assert batches(1) == batches(2) == batches(4)
    assert all(len(batch) == size for batch in batches(1))
    assert len(batches(1)) == num // size


@settings(max_examples=50)
@given(num=st.integers(1, 60), size=st.sampled_from([4, 8]), world_size=st.sampled_from([1, 2, 4]))
def test_evaluation_sees_every_sample_exactly_once(num: int, size: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        order = BatchSampler(num, batch_size=size, shuffle=False, seed=0, rank=rank, world_size=world_size)
        batches = list(order)
        assert len(batches) == len(order)
        assert all(batches)
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(num))


def test_seed_and_epoch_alone_decide_the_order() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchSampler(50, batch_size=8, shuffle=True, seed=seed)
        sampler.epoch = epoch
        torch.randn(3)  # other random numbers do not matter
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("start", range(7))
def test_an_epoch_can_be_entered_at_any_batch(start: int) -> None:
    whole, late = (BatchSampler(50, batch_size=8, shuffle=True, seed=3) for _ in range(2))
    late.start = start
    assert list(late) == list(whole)[start:]
    assert len(late) == len(whole)


TARGETS = torch.arange(97) % 5  # classes of 20, 20, 19, 19, 19


@settings(max_examples=40)
@given(classes=st.sampled_from([1, 2, 4, 5]), epoch=st.integers(0, 3), world_size=st.sampled_from([1, 2]))
def test_batches_of_few_classes_have_no_more_and_no_sample_twice(classes: int, epoch: int, world_size: int) -> None:
    size = 4 * classes
    orders = [
        FewClassesSampler(TARGETS, classes_per_batch=classes, batch_size=size, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for order in orders:
        order.epoch = epoch
    batches = [list(chain(*parts)) for parts in zip(*orders, strict=True)]
    assert len(batches) == len(orders[0]) == sum(count // 4 for count in TARGETS.bincount().tolist()) // classes
    assert all(len(batch) == size for batch in batches)
    assert all(1 <= len(TARGETS[batch].unique()) <= classes for batch in batches)
    seen = list(chain(*batches))
    assert len(set(seen)) == len(seen)
    single = FewClassesSampler(TARGETS, classes_per_batch=classes, batch_size=size, seed=1)
    single.epoch = epoch
    assert [set(batch) for batch in single] == [set(batch) for batch in batches]


def test_other_epochs_bring_the_samples_that_were_left_out() -> None:
    order = FewClassesSampler(TARGETS, classes_per_batch=1, batch_size=4, seed=0)
    seen = set()
    for epoch in range(12):
        order.epoch = epoch
        seen |= {index for batch in order for index in batch}
    assert seen == set(range(97))


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [
        (6, 12, "classes_per_batch=6: from 1 to the 5 classes of the data"),
        (0, 12, "classes_per_batch=0: from 1 to the 5"),
        (5, 12, "classes_per_batch=5: it does not divide batch_size=12 into equal parts"),
        (1, 32, "classes_per_batch=1: class 2 has 19 training samples, and a batch of 32 takes 32 of a class; choose"),
    ],
)
def test_few_classes_that_make_no_batch_are_refused(classes: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewClassesSampler(TARGETS, classes_per_batch=classes, batch_size=size, seed=0)
