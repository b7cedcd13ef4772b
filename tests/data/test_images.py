"""Encoded images: parquet files in the Hub's layout and folders, decoded once, and errors that name file and row."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ablab.data.datamodule import DataModule
from ablab.data.encoded_images import resize_and_crop
from ablab.data.hf_image import HFImage
from ablab.data.image_folder import ImageFolder

Parquet = Callable[..., Path]


@pytest.fixture
def parquet(tmp_path: Path) -> Parquet:
    """Write splits of so many images, each of one colour that says its number; `change` alters the columns first."""
    import datasets

    def write(*, change: Callable[[dict[str, Any]], None] = lambda table: None, **sizes: int) -> Path:
        for split, number in sizes.items():
            images = [Image.fromarray(np.full((6, 6, 3), (i, 10, 200), dtype=np.uint8)) for i in range(number)]
            table: dict[str, Any] = {"image": images, "label": [i % 3 for i in range(number)]}
            change(table)
            kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
            features = datasets.Features({name: kinds.get(name, datasets.Value("int64")) for name in table})
            whole = datasets.Dataset.from_dict(table, features)
            for part in range(2):
                whole.shard(2, part, contiguous=True).to_parquet(tmp_path / f"{split}-{part}.parquet")
        return tmp_path

    return write


def sixteen_bits() -> dict[str, bytes]:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(file, "PNG")
    return {"bytes": file.getvalue()}


def make(root: Path, **settings: Any) -> HFImage:
    data = HFImage(name="x", root=str(root), batch_size=4, val_fraction=0.2, **settings)
    data.setup()
    return data


def test_parquet_files_are_read_in_order_with_their_classes(parquet: Parquet) -> None:
    data = make(parquet(train=30, test=12))
    assert data.splits is not None
    assert [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)] == [24, 6, 12]
    assert data.model_sizes == {"in_channels": 3, "num_classes": 3}
    assert data.task_sizes == {"class_names": ["a", "b", "c"]}
    batch = data.splits.test[[5, 7]]
    assert batch.inputs.dtype == torch.uint8
    assert batch.inputs.shape == (2, 3, 6, 6)
    assert batch.inputs[:, :, 0, 0].tolist() == [[5, 10, 200], [7, 10, 200]]
    assert batch.targets.tolist() == [2, 1]


def test_an_official_validation_part_is_used_and_grey_is_grey(parquet: Parquet) -> None:
    data = make(parquet(train=30, validation=9, test=12), val_split="validation", in_channels=1)
    assert data.splits is not None
    assert [len(part) for part in (data.splits.train, data.splits.val)] == [30, 9]
    assert data.splits.test[[0]].inputs.shape == (1, 1, 6, 6)


def test_images_are_decoded_once(parquet: Parquet, monkeypatch: pytest.MonkeyPatch) -> None:
    root = parquet(train=30, test=12)
    first = make(root)
    monkeypatch.setattr("ablab.data.encoded_images.decode", None)  # may not be called again
    second = make(root)
    assert first.fingerprint == second.fingerprint
    with pytest.raises(TypeError):
        make(root, image_size=4)  # other images, decoded anew


def test_changed_files_are_other_data(parquet: Parquet) -> None:
    before = make(parquet(train=30, test=12)).fingerprint
    after = make(parquet(train=30, test=12, change=lambda table: table["label"].reverse())).fingerprint
    assert before != after


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.update(picture=table.pop("label")), r"the columns image, picture, and label is missing"),
        (
            lambda table: table.update(image=[*table["image"][:7], Image.new("RGB", (9, 5)), *table["image"][8:]]),
            r"test-1.parquet, row 1: it has 5x9 pixels, and the first image 6x6; set data.image_size",
        ),
        (
            lambda table: table.update(image=[*table["image"][:7], {"bytes": b"no image"}, *table["image"][8:]]),
            r"test-1.parquet, row 1: it cannot be decoded \(cannot identify image file",
        ),
        (
            lambda table: table.update(image=[None, *table["image"][1:]]),
            r"test-0.parquet, row 0: there is no image in image; leave the row out",
        ),
        (
            lambda table: table.update(label=[*table["label"][:7], -1, *table["label"][8:]]),
            r"test-1.parquet, row 1: its label -1 is not from 0 to 2; fix it, or leave the row out",
        ),
        (
            lambda table: table.update(label=[*table["label"][:7], None, *table["label"][8:]]),
            r"test-1.parquet, row 1: its label None is not from 0 to 2",
        ),
        (
            lambda table: table.update(image=[*table["image"][:7], sixteen_bits(), *table["image"][8:]]),
            r"test-1.parquet, row 1: it has more than 8 bits a channel \(mode I;16\)",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_file(parquet: Parquet, change: Any, message: str) -> None:
    root = parquet(train=30)
    parquet(test=12, change=change)
    with pytest.raises(ValueError, match=message):
        make(root)
    # nothing half made is left to be read
    assert not list(Path(root / "cache").glob("*.part"))


def test_missing_and_broken_files_are_named(parquet: Parquet) -> None:
    with pytest.raises(ValueError, match="root=/no/such: there is no such folder"):
        make(Path("/no/such"))
    root = parquet(train=30, test=12)
    for file in root.glob("test-*.parquet"):
        file.rename(root / f"other{file.name}")
    with pytest.raises(ValueError, match=r"no test.parquet or test-.* there"):
        make(root)
    file = root / "train-0.parquet"
    file.write_bytes(file.read_bytes()[:500])
    parquet(test=12)
    with pytest.raises(ValueError, match=r"train-0.parquet: it cannot be read \(.*\); fetch it again"):
        make(root)


def test_files_of_other_splits_and_of_two_data_sets_are_not_mixed_up(parquet: Parquet) -> None:
    root = parquet(train=30, train_extra=15, test=12)
    data = make(root)
    assert data.splits is not None
    assert len(data.splits.train) + len(data.splits.val) == 30
    (root / "other").mkdir()
    (root / "other" / "train-0.parquet").write_bytes((root / "train-0.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"all have files of train; give one of them"):
        make(root)


def test_classes_in_another_order_are_refused(parquet: Parquet) -> None:
    import datasets

    root = parquet(train=30, test=12)
    swapped = datasets.load_dataset("parquet", data_files=[str(f) for f in sorted(root.glob("test-*"))], split="train")
    swapped = swapped.cast_column("label", datasets.ClassLabel(names=["b", "a", "c"]))
    for file in root.glob("test-*"):
        file.unlink()
    swapped.to_parquet(root / "test.parquet")
    with pytest.raises(
        ValueError, match=r"test.parquet has the classes b, a, c, and .*train-0.parquet has the classes a, b, c"
    ):
        make(root)


def test_the_middle_of_an_image_is_scaled() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    image = np.asarray(resize_and_crop(Image.fromarray(wide), 5))
    assert image.shape == (5, 5, 3)
    assert image[:, 1:4].min() > 150


# Streaming ---------------------------------------------------------------------------------------------------------


def batches(data: DataModule) -> list[list[int]]:
    """The images of each batch, by the number that they show."""
    return [batch.inputs[:, 0, 0, 0].tolist() for batch in data.train_dataloader()]


def test_a_stream_gives_every_sample_once_in_shuffled_blocks(parquet: Parquet) -> None:
    root = parquet(train=48, validation=9, test=12)
    streamed = {"streaming": True, "val_split": "validation", "shuffle_block": 16}
    data = make(root, **streamed)
    found = batches(data)
    assert len(found) == len(data.train_dataloader()) == 12
    assert sorted(chain(*found)) == list(range(48))
    assert all({n // 16 for n in chain(*found[4 * b : 4 * b + 4])} == {b} for b in range(3))
    assert found != [sorted(batch) for batch in found]
    assert batches(make(root, **streamed)) == found
    assert batches(make(root, seed=1, **streamed)) != found
    assert data.fingerprint == make(root, **streamed).fingerprint


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_a_stream(parquet: Parquet, world_size: int) -> None:
    root = parquet(train=48, validation=9, test=12)
    data = make(root, streaming=True, val_split="validation", shuffle_block=10, num_workers=2)
    alone = batches(data)
    loaders = [data.train_dataloader() for _ in range(world_size)]
    for rank, loader in enumerate(loaders):
        loader.rank, loader.world_size = rank, world_size
    parts = [[batch.inputs[:, 0, 0, 0].tolist() for batch in loader] for loader in loaders]
    assert [set(chain(*shares)) for shares in zip(*parts, strict=True)] == [set(batch) for batch in alone]


def test_a_stream_cannot_be_split(parquet: Parquet) -> None:
    root = parquet(train=48, test=12)
    with pytest.raises(ValueError, match="streaming=true: a stream can neither be split nor picked from; name"):
        make(root, streaming=True)


# Folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_read(files: Path) -> None:
    data = ImageFolder(root=str(files / "folder"), in_channels=1)
    data.setup()
    assert data.splits is not None
    assert data.class_names == [f"class {digit}" for digit in range(10)]
    assert len(data.splits.test) == 100
    parts = ImageFolder(root=str(files / "folder" / "train"), in_channels=1)
    parts.setup()
    assert parts.splits is not None
    assert [len(part) for part in (parts.splits.train, parts.splits.val, parts.splits.test)] == [216, 24, 60]


def test_folders_that_are_no_data_set_are_refused_by_name(files: Path, tmp_path: Path) -> None:
    def read(root: Path) -> None:
        ImageFolder(root=str(root)).setup()

    with pytest.raises(ValueError, match="there is no such folder; give one with a folder for each class"):
        read(tmp_path / "no")
    with pytest.raises(ValueError, match="there are no folders in it"):
        read(tmp_path)
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train/a: there is no image in it; a class needs some, or no folder"):
        read(tmp_path)
    for split, name in (("train", "a"), ("test", "a"), ("test", "b")):
        (tmp_path / split / name).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.png")
    with pytest.raises(ValueError, match=r"test: the training part has no class b; give training"):
        read(tmp_path)
    (tmp_path / "test" / "b").rename(tmp_path / "train" / "b")
    (tmp_path / "train" / "a" / "x.png").mkdir()  # a folder, a hidden file and a hidden folder are no images
    (tmp_path / "train" / "a" / "._1.png").write_bytes(b"")
    (tmp_path / "train" / "a" / ".hidden").mkdir()
    (tmp_path / "train" / "a" / ".hidden" / "1.png").write_bytes(b"")
    (tmp_path / "train" / "a" / "2.JPG").write_bytes((tmp_path / "train" / "a" / "1.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"train/a/2.JPG: it cannot be decoded .*; replace it, or leave it out"):
        read(tmp_path)


@pytest.mark.slow
@pytest.mark.thorough
def test_the_real_cifar10_is_read_whole(shared_data: Callable[[str], Path]) -> None:
    data = HFImage(name="uoft-cs/cifar10", root=str(shared_data("cifar10")), image_column="img")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup()
    assert data.splits is not None
    parts = (data.splits.train, data.splits.val, data.splits.test)
    assert [len(part) for part in parts] == [45000, 5000, 10000]
    assert "airplane" in data.class_names
    # the channels' known means and standard deviations, over 255
    torch.testing.assert_close(data.mean.flatten() / 255, torch.tensor([0.491, 0.482, 0.447]), rtol=0, atol=0.005)
    torch.testing.assert_close(data.std.flatten() / 255, torch.tensor([0.247, 0.243, 0.262]), rtol=0, atol=0.005)
    contents = [{image.numpy().tobytes() for image in part[range(len(part))].inputs} for part in parts]
    assert [len(part) for part in contents] == [45000, 5000, 10000]
    assert len(set.union(*contents)) == 60000
