"""The order of the data, the splits, and what a batch is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.data.cifar10 import CIFAR10
from ablab.data.datamodule import BatchOrder, DataModule, TensorSplit, stratified_holdout
from ablab.data.digits import Digits
from ablab.data.digits_rows import DigitsRows


@settings(max_examples=50, deadline=None)
@given(num=st.integers(8, 60), size=st.sampled_from([4, 8]), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_the_same_samples_make_up_each_global_batch_on_any_number_of_processes(
    num: int, size: int, seed: int, epoch: int
) -> None:
    def batches(world_size: int) -> list[set[int]]:
        orders = [
            BatchOrder(num, batch_size=size, shuffle=True, seed=seed, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for order in orders:
            order.set_epoch(epoch)
        return [set().union(*parts) for parts in zip(*orders, strict=True)]

    assert batches(1) == batches(2) == batches(4)
    assert all(len(batch) == size for batch in batches(1))
    assert len(batches(1)) == num // size


@settings(max_examples=50, deadline=None)
@given(num=st.integers(1, 60), size=st.sampled_from([4, 8]), world_size=st.sampled_from([1, 2, 4]))
def test_evaluation_sees_every_sample_exactly_once(num: int, size: int, world_size: int) -> None:
    seen = []
    for rank in range(world_size):
        order = BatchOrder(num, batch_size=size, shuffle=False, seed=0, rank=rank, world_size=world_size)
        batches = list(order)
        assert len(batches) == len(order)
        assert all(batches)
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(num))


def test_seed_and_epoch_alone_decide_the_order() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchOrder(50, batch_size=8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        torch.randn(3)  # other random numbers do not matter
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_batches(workers: int) -> None:
    data = Digits(batch_size=100, num_workers=workers)
    data.setup()
    alone = Digits(batch_size=100)
    alone.setup()
    for a, b in zip(data.train_dataloader(), alone.train_dataloader(), strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)


def contents(data: DataModule, part: str) -> list[bytes]:
    assert data.splits is not None
    split = getattr(data.splits, part)
    assert isinstance(split, TensorSplit)
    return [inputs.numpy().tobytes() for inputs in split.inputs]


def test_no_digit_is_in_two_splits() -> None:
    data = Digits()
    data.setup()
    train, val, test = (set(contents(data, part)) for part in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(train) + len(val) + len(test) == 1797


def test_test_digits_are_always_the_same_and_validation_follows_its_seed() -> None:
    first, second = Digits(split_seed=0, seed=0), Digits(split_seed=1, seed=1)
    first.setup()
    second.setup()
    assert contents(first, "test") == contents(second, "test")
    assert contents(first, "val") != contents(second, "val")


def test_the_standardization_is_the_training_splits() -> None:
    data = Digits()
    data.setup()
    assert data.splits is not None
    everything = data.on_after_batch_transfer(data.splits.train[list(range(1149))], 0).inputs
    assert everything.mean().abs() < 1e-5
    assert abs(everything.std() - 1) < 1e-3


def test_rows_are_the_same_images() -> None:
    images, rows = Digits(), DigitsRows()
    images.setup()
    rows.setup()
    for part in ("train", "val", "test"):
        assert contents(images, part) == contents(rows, part)


def test_a_holdout_has_the_classes_in_equal_shares() -> None:
    targets = torch.arange(1000) % 10
    kept, held_out = stratified_holdout(targets, 0.2, seed=3)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(1000))
    assert targets[held_out].bincount().tolist() == [20] * 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(batch_size=0), "batch_size=0: a batch has at least one sample"),
        (lambda: Digits(num_workers=-1), "num_workers=-1: use 0"),
        (lambda: Digits(batch_size=1150).setup(), "batch_size=1150 is more than the 1149 training samples"),
        (lambda: Digits(val_fraction=0.999).setup(), "val_fraction=0.999: both parts"),
        (lambda: Digits(split_seed=-1).setup(), "split_seed=-1: a seed is 0 or more"),
        (
            lambda: Digits(val_fraction=1.5).setup(),
            "val_fraction=1.5: both parts of 1437 samples need each of the 10 classes",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_global_batch_must_divide_by_the_processes() -> None:
    data = Digits(batch_size=10)
    data.setup()
    with pytest.raises(ValueError, match="batch_size=10: it is the global batch and does not divide by 4 processes"):
        data.example(4)


# CIFAR-10, on files in the Hub's layout ----------------------------------------------------------------------------


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """Twenty real images in the layout of the Hub."""
    import datasets
    import numpy as np
    from PIL import Image

    def image(i: int) -> Image.Image:
        return Image.fromarray(np.full((32, 32, 3), (i, 10, 200), dtype=np.uint8))

    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=[f"class{c}" for c in range(10)])}
    )
    for split, number in (("train", 40), ("test", 20)):
        table = {"img": [image(i) for i in range(number)], "label": [i % 10 for i in range(number)]}
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def test_cifar10_reads_the_hubs_files(cifar_folder: Path) -> None:
    data = CIFAR10(root=str(cifar_folder), batch_size=8, val_fraction=0.25)
    data.setup()
    assert data.splits is not None
    assert [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)] == [30, 10, 20]
    assert data.model_sizes == {"in_channels": 3, "num_classes": 10}
    assert data.class_names[3] == "class3"
    batch = data.splits.test[[5, 7]]
    assert batch.inputs.shape == (2, 3, 32, 32)
    assert batch.inputs[1, :, 0, 0].tolist() == [7, 10, 200]
    assert batch.targets.tolist() == [5, 7]


def test_cifar10_says_what_is_missing_and_where(cifar_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root=/no/such: there is no such folder"):
        CIFAR10(root="/no/such").setup()
    (cifar_folder / "test-00000-of-00001.parquet").rename(cifar_folder / "other.parquet")
    with pytest.raises(ValueError, match=r"no test\*.parquet there"):
        CIFAR10(root=str(cifar_folder), batch_size=8, val_fraction=0.25).setup()
    file = cifar_folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet cannot be read as parquet .* fetch it again"):
        CIFAR10(root=str(cifar_folder)).setup()


def test_cifar10_names_a_missing_column(tmp_path: Path) -> None:
    import datasets

    for split in ("train", "test"):
        datasets.Dataset.from_dict({"picture": [1], "label": [0]}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="the train split has the columns picture, label, and img is missing"):
        CIFAR10(root=str(tmp_path)).setup()


@pytest.mark.slow
def test_the_real_cifar10_is_read_whole(shared_data: Callable[[str], Path]) -> None:
    data = CIFAR10(root=str(shared_data("cifar10")))
    data.setup()
    assert data.splits is not None
    assert [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)] == [
        45000,
        5000,
        10000,
    ]
    assert "airplane" in data.class_names
    # the channels' known means and standard deviations, over 255
    torch.testing.assert_close(data.mean.flatten() / 255, torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=0.005)
    torch.testing.assert_close(data.std.flatten() / 255, torch.tensor([0.247, 0.243, 0.262]), rtol=0, atol=0.005)
