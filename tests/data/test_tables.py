"""Tables: shards of one export, labels of any type, images beside the table, and folders of `save_to_disk`."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ablab.data.hf_image import HFImage
from ablab.data.hf_text import HFText
from ablab.data.tables import ArrowShard, HubShard, ParquetShard, Table, file_table, hub_table

NAMES = ["cat", "dog"]


def png(value: int, number: int = 0) -> bytes:
    """Return an image of one shade; its first pixel is a number, so that no two images are the same."""
    pixels = np.full((4, 4, 3), value, dtype=np.uint8)
    pixels[0, 0] = (number % 256, number // 256, 7)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(labels: Sequence[Any], start: int = 0) -> list[bytes]:
    """Return an image for each label, its shade given by the label."""
    return [png(40 + 3 * (sum(str(label).encode()) % 2), start + i) for i, label in enumerate(labels)]


def write(file: Path, labels: Sequence[Any], *, names: list[str] | None = None, kind: Any = None, **more: Any) -> Path:
    """Write a parquet file with plain columns; with `names`, also the metadata that the Hub has for ClassLabel."""
    start = sum(file.name.encode()) * 100 % 60_000  # other images in every file
    images = more.pop("images", None) or pictures(labels, start)
    table = pyarrow.table({more.pop("column", "image"): images, "label": pyarrow.array(labels, kind), **more})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, file, row_group_size=more.pop("row_group_size", 7))
    return file


def read(root: Path, **settings: Any) -> HFImage:
    data = HFImage(root=str(root), **{"batch_size": 4, "val_fraction": 0.2, **settings})
    data.setup()
    return data


def sizes(data: HFImage | HFText) -> list[int]:
    return [len(part) for part in vars(data.splits).values()]


# Shards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train-00000-of-00003", "train-00002-of-00003"],
            "of the 3 files of train, train-00001-of-00003.* is mi",
        ),
        (["train-00003-of-00004"], "train-00000-of-00004.parquet and 2 more are missing; fetch all, or export again"),
        (["train", "train-00000-of-00001"], "train-00000-of-00001.parquet, train.parquet are files of several exports"),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], "of several exports of train; keep"),
        (["train-00000-of-00001", "train-extra"], "are files of several exports of train"),
        (["train-00000-of-00001-ab", "train-00000-of-00001-cd"], "are more than the 1 files of train"),
    ],
)
def test_shards_that_are_not_one_whole_export_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    write(tmp_path / "test.parquet", [0, 1] * 4, names=NAMES)
    for file in files:
        write(tmp_path / f"{file}.parquet", [0, 1] * 10, names=NAMES)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ["data/train-00000-of-00002", "data/train-00001-of-00002"],
        ["train-00001-of-00002", "train-00002-of-00002"],  # counted from 1
        ["train-00000-of-00002-0123456789abcdef", "train-00001-of-00002-fedcba9876543210"],
        ["train-2019", "train-2021"],
    ],
)
def test_whole_exports_are_read_in_any_layout(tmp_path: Path, files: list[str]) -> None:
    write(tmp_path / "data" / "test.parquet", [0, 1] * 4, names=NAMES)
    for file in files:
        write(tmp_path / f"{file}.parquet", [0, 1] * 10, names=NAMES)
    write(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.parquet", [0, 1], names=NAMES)
    write(tmp_path / ".cache" / "train.parquet", [0, 1], names=NAMES)
    write(tmp_path / "data" / "._train-3.parquet", [0, 1], names=NAMES)
    assert sizes(read(tmp_path)) == [32, 8, 8]


def test_links_to_folders_are_followed_and_cycles_end(tmp_path: Path) -> None:
    for split, number in (("train", 20), ("test", 4)):
        write(tmp_path / "disk" / f"{split}.parquet", [0, 1] * number, names=NAMES)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "again").symlink_to(tmp_path / "root")
    assert sizes(read(tmp_path / "root")) == [32, 8, 8]
    (tmp_path / "disk" / "train-1.parquet").symlink_to(tmp_path / "gone.parquet")
    (tmp_path / "disk" / "train.parquet").rename(tmp_path / "disk" / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-1.parquet: it cannot be read"):
        read(tmp_path / "root")


def test_a_shard_under_two_names_is_refused_unless_it_is_empty(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [0, 1] * 4, names=NAMES)
    for number in (0, 1):
        write(tmp_path / f"train-empty{number}.parquet", [])
    file = write(tmp_path / "train-a.parquet", [0, 1] * 10, names=NAMES)
    assert sizes(read(tmp_path)) == [16, 4, 8]
    shutil.copy(file, tmp_path / "train-b.parquet")
    with pytest.raises(ValueError, match=r"train-b.parquet is a copy of train-a.parquet; remove one of them"):
        read(tmp_path)


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 10, names=NAMES)
    write(tmp_path / "test.parquet", [], names=NAMES)
    with pytest.raises(ValueError, match=r"root=.*: the test split has no rows"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"labels": [0, 1] * 10, "names": ["dog", "cat"]}, "has the classes dog, cat, and .* has the classes cat, dog"),
        ({"labels": [0, 1] * 10, "names": ["cat", "dog", "cow"]}, "has the classes cat, dog, cow, and"),
        ({"labels": [0, 1] * 10}, r"-of-00002.parquet has integers as labels, without class names, and .* has the cl"),
        ({"labels": ["cat", "dog"] * 10}, "has strings as labels, without class names, and"),
        ({"labels": [0, 1] * 10, "names": NAMES, "column": "picture"}, "image is missing in .*train-00001-of-00002"),
        (
            {"labels": [0, 1] * 10, "names": NAMES, "images": [3] * 20},
            "00001-of-00002.parquet has int64 there, which",
        ),
    ],
)
def test_shards_with_other_features_are_refused_by_name(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    write(tmp_path / "test.parquet", [0, 1] * 4, names=NAMES)
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1] * 10, names=NAMES)
    write(tmp_path / "train-00001-of-00002.parquet", **second)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_columns_that_nobody_asked_for_may_differ_between_shards(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [0, 1] * 4, names=NAMES)
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1] * 10, names=NAMES, source=["web"] * 20)
    write(tmp_path / "train-00001-of-00002.parquet", [0, 1] * 10, names=NAMES, number=[1.0] * 20)
    assert sizes(read(tmp_path)) == [32, 8, 8]


def test_files_that_are_cut_off_or_not_fetched_are_named(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [0, 1] * 4, names=NAMES)
    file = write(tmp_path / "train.parquet", [0, 1] * 10, names=NAMES)
    content = file.read_bytes()
    for broken in (content[:-9], content[: len(content) // 2], b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"train.parquet: it cannot be read \(.*\); fetch it again"):
            read(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"train.parquet: .* it only points to the data: run git lfs pull"):
        read(tmp_path)


def test_columns_and_metadata_that_are_damaged_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "train.parquet", [0, 1] * 10)
    write(tmp_path / "test.parquet", [0, 1] * 4)
    for metadata in ("{broken", '{"info": []}', "[]"):
        table = parquet.read_table(file)
        parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), file)
        with pytest.raises(ValueError, match=r"train.parquet: its Hub metadata cannot be read"):
            read(tmp_path)
    parquet.write_table(table.append_column("label", table["label"]), file)
    with pytest.raises(ValueError, match=r"train.parquet: it has 2 columns label; rename them"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"root=.*train.parquet: this is a file, not a folder; give one with"):
        read(file)


def test_a_missing_part_is_answered_with_the_parts_that_there_are(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [0, 1] * 10, names=NAMES)
    write(tmp_path / "validation-0.parquet", [0, 1] * 4, names=NAMES)
    with pytest.raises(ValueError, match=r"no test.parquet or test-\*.parquet there; there is train, validation, and"):
        read(tmp_path)
    data = read(tmp_path, test_split="validation")
    assert sizes(data) == [16, 4, 8]
    assert not any("not used" in line for line in data.caveats())


def test_a_validation_part_that_nobody_asked_for_is_mentioned(tmp_path: Path) -> None:
    for split, number in (("train", 10), ("valid", 3), ("test", 4)):
        write(tmp_path / f"{split}.parquet", [0, 1] * number, names=NAMES)
    note = "6 of valid not used, data.val_split=valid validates on them"
    assert note in read(tmp_path).caveats()
    assert note not in read(tmp_path, val_split="valid").caveats()


# Labels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test", "kind", "names", "notes"),
    [
        ([0, 1, 2], [2, 0], "int64", ["0", "1", "2"], []),
        ([0, 1, 2], [2, 0], "uint8", ["0", "1", "2"], []),
        ([-1, 1], [1], "int8", ["-1", "1"], ["the labels -1, 1 are the classes 0 to 1"]),
        ([3, 20, 100], [20], "int32", ["3", "20", "100"], ["the labels 3, 20, 100 are the classes 0 to 2"]),
        (["dog", "cat"], ["dog"], "string", ["cat", "dog"], []),
        (["10", "9"], ["9"], "large_string", ["10", "9"], []),
        ([True, False], [True], "bool", ["False", "True"], []),
        (["b", "a"], ["a"], pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), ["a", "b"], []),
    ],
)
def test_plain_labels_are_classes_in_the_order_of_their_values(
    tmp_path: Path, train: list[Any], test: list[Any], kind: Any, names: list[str], notes: list[str]
) -> None:
    kind = pyarrow.type_for_alias(kind) if isinstance(kind, str) else kind
    for split, labels in (("train", train * 10), ("val", train * 2), ("test", test * 2)):
        write(tmp_path / f"{split}.parquet", labels, kind=kind)
    data = read(tmp_path, val_split="val")
    streamed = read(tmp_path, val_split="val", streaming=True)
    for found in (data, streamed):
        assert found.class_names == names
        assert [line for line in found.caveats() if line.startswith("the labels")] == notes
        assert found.splits is not None
        assert [names[i] for i in found.splits.test[range(len(test))].targets] == [str(label) for label in test]
    assert data.splits is not None
    assert [names[i] for i in data.splits.train[range(len(train))].targets] == [str(label) for label in train]
    targets = torch.cat([batch.targets for batch in streamed.train_dataloader()])
    assert set(targets.tolist()) == set(range(len(names)))


@pytest.mark.parametrize("container", ["bytes", "struct", "path"])
def test_tables_of_pandas_are_read_with_any_column_of_images(tmp_path: Path, container: str) -> None:
    import pandas

    for split, number in (("train", 20), ("test", 4)):
        images: list[Any] = pictures([0, 1] * number, len(split))
        if container == "struct":
            images = [{"bytes": image, "path": "somewhere.png"} for image in images]
        if container == "path":
            for i, image in enumerate(images):
                (tmp_path / f"{split}{i}.png").write_bytes(image)
            images = [f"{split}{i}.png" for i in range(len(images))]
        pandas.DataFrame({"image": images, "label": [5, 7] * number}).to_parquet(tmp_path / f"{split}.parquet")
    data = read(tmp_path)
    assert sizes(data) == [32, 8, 8]
    assert data.class_names == ["5", "7"]
    assert len(data.extra_files) == (48 if container == "path" else 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0] * 4, "has double there; a class is an integer, a string or a boolean, so cast the labels"),
        ([0.0, float("nan")] * 4, "has double there"),
        ([[0], [1]] * 4, r"has list<.*> there; a class is"),
        (["a", ""] * 4, r"train.parquet, row 1: its label '' is not a class"),
        (["a", None] * 4, r"train.parquet, row 1: its label None is not a class; fix it, or leave the row out"),
        ([3, None] * 4, r"train.parquet, row 1: its label None is not a class"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_no_classes_are_refused(
    tmp_path: Path, labels: list[Any], message: str, streaming: bool
) -> None:
    write(tmp_path / "train.parquet", labels)
    for split in ("test", "val"):
        write(tmp_path / f"{split}.parquet", [label for label in labels if label not in (None, "")])
    with pytest.raises(ValueError, match=message):
        read(tmp_path, streaming=streaming, val_split="val")


def test_labels_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [None] * 8, kind=pyarrow.string())
    with pytest.raises(ValueError, match="has no labels, only empty fields; choose another column"):
        read(tmp_path)


def test_a_class_that_only_the_test_part_has_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", ["cat", "dog"] * 10)
    write(tmp_path / "test.parquet", ["cat", "dog", "emu", "emu"])
    with pytest.raises(ValueError, match="no training sample has the class emu; give some, or leave the class out"):
        read(tmp_path)


def test_another_value_in_one_part_gives_all_parts_other_targets(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [3, 5, 9] * 10)
    write(tmp_path / "test.parquet", [3, 5, 9])
    assert read(tmp_path).splits.test[range(3)].targets.tolist() == [0, 1, 2]  # type: ignore[union-attr]
    write(tmp_path / "train.parquet", [3, 4, 5, 9] * 10)  # the test part is cached, and its targets are others now
    assert read(tmp_path).splits.test[range(3)].targets.tolist() == [0, 2, 3]  # type: ignore[union-attr]


def test_a_run_trains_on_plain_labels_and_says_which_classes_they_are(
    run: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    write(tmp_path / "train.parquet", [10, 20, 30] * 10)
    write(tmp_path / "test.parquet", [10, 20, 30])
    done = run("data=hf_image", f"data.root={tmp_path}", "data.batch_size=4", "data.val_fraction=0.2")
    assert "; the labels 10, 20, 30 are the classes 0 to 2" in done.printed


# Images beside the table --------------------------------------------------------------------------------------------


def with_paths(root: Path, *, prefix: str = "", value: int = 40) -> None:
    """Write parquet files as `Dataset.to_parquet` does for images that were read from files: with paths only."""
    for split, number in (("train", 20), ("test", 4)):
        for i in range(number):
            (root / f"{split}{i}.png").write_bytes(png(value, len(split) * 1000 + i))
        images = [{"bytes": None, "path": f"{prefix}{split}{i}.png"} for i in range(number)]
        write(root / f"{split}.parquet", [0, 1] * (number // 2), names=NAMES, images=images)


@pytest.mark.parametrize("prefix", ["", "{root}/", "./"])
def test_images_that_a_table_points_to_are_part_of_its_key(tmp_path: Path, prefix: str) -> None:
    prefix = prefix.format(root=tmp_path)
    with_paths(tmp_path, prefix=prefix)
    before, same = read(tmp_path), read(tmp_path)
    assert before.fingerprint == same.fingerprint
    with_paths(tmp_path, prefix=prefix, value=200)
    after = read(tmp_path)
    assert before.fingerprint != after.fingerprint
    assert after.splits is not None
    assert int(after.splits.test[[0]].inputs[0, 0, 3, 3]) == 200


def test_images_that_a_stream_points_to_are_read_and_their_sizes_are_in_its_fingerprint(tmp_path: Path) -> None:
    with_paths(tmp_path)
    settings: dict[str, Any] = {"streaming": True, "val_split": "test"}
    before = read(tmp_path, **settings)
    note = "the fingerprint of the streamed part covers sizes and ends of files, and all labels, not every image"
    assert note in before.caveats()
    assert {int(image[0, 3, 3]) for batch in before.train_dataloader() for image in batch.inputs} == {40}
    file = tmp_path / "train7.png"
    Image.open(io.BytesIO(png(90))).resize((4, 4)).save(file, compress_level=0)
    assert read(tmp_path, **settings).fingerprint != before.fingerprint


def test_a_stream_with_other_labels_has_another_fingerprint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"streaming": True, "val_split": "test"}
    noise = [np.random.default_rng(i).bytes(30_000) for i in range(20)]  # more than the end of a file that is hashed
    write(tmp_path / "test.parquet", [0, 1] * 4)
    found = []
    for labels in ([0, 1] * 10, [1, 0] * 10):
        write(tmp_path / "train.parquet", labels, images=pictures(labels, 300), noise=noise)
        table = parquet.read_table(tmp_path / "train.parquet").select(["label", "image", "noise"])
        parquet.write_table(table, tmp_path / "train.parquet", write_statistics=False, use_dictionary=False)
        found.append(read(tmp_path, **settings).fingerprint)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            {"path": "no.png"},
            r"train.parquet, row 3: it points to the image .*/no.png, which is not there \(1 such",
        ),
        (
            {"path": "https://example.com/a.png"},
            r"train.parquet, row 3: its image is at https://example.com/a.png",
        ),
        ({"path": "zip://a.png::https://example.com/a.zip"}, "images are not downloaded; export with Dataset.save_to"),
        ({"path": None}, "train.parquet, row 3: there is no image in image; leave the row out"),
        (None, "train.parquet, row 3: there is no image in image; leave the row out"),
    ],
)
def test_images_that_are_not_there_are_refused(tmp_path: Path, image: Any, message: str) -> None:
    write(tmp_path / "test.parquet", [0, 1] * 4)
    images = [{"bytes": png(40, i), "path": f"{i}.png"} for i in range(20)]
    write(
        tmp_path / "train.parquet", [0, 1] * 10, images=[*images[:3], image and {"bytes": None, **image}, *images[4:]]
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("statistics", [True, False])
def test_only_rows_without_bytes_point_to_files(tmp_path: Path, statistics: bool) -> None:
    embedded = [{"bytes": png(40, i), "path": "not/there.png"} for i in range(20)]
    file = write(tmp_path / "train.parquet", [0, 1] * 10, images=embedded)
    parquet.write_table(parquet.read_table(file), file, write_statistics=statistics)
    table = Table("root=x", "train", [ParquetShard(file)])
    assert table.external_files("image") == []
    (tmp_path / "a.png").write_bytes(png(40))
    images = [*embedded[:19], {"bytes": None, "path": "a.png"}]
    write(file, [0, 1] * 10, images=images)
    parquet.write_table(parquet.read_table(file), file, write_statistics=statistics)
    assert Table("root=x", "train", [ParquetShard(file)]).external_files("image") == [tmp_path / "a.png"]


# save_to_disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a data set with `save_to_disk`: parts by name, or one of so many rows without parts."""
    import datasets

    datasets.disable_progress_bars()
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})

    def write(root: str, number: int = 0, *, shards: int | None = None, value: int = 40, **parts: int) -> Path:
        def rows(number: int, start: int) -> Any:
            images = [{"bytes": png(value, start + i), "path": None} for i in range(number)]
            return datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(number)]}, kinds)

        if parts:
            whole = datasets.DatasetDict({name: rows(number, len(name) * 1000) for name, number in parts.items()})
            whole.save_to_disk(tmp_path / root, num_shards=None if shards is None else dict.fromkeys(parts, shards))
        else:
            rows(number, 0).save_to_disk(tmp_path / root, num_shards=shards)
        return tmp_path / root

    return write


def test_a_saved_dataset_dict_is_read_like_parquet_and_its_content_is_its_key(saved: Callable[..., Path]) -> None:
    data = read(saved("a", train=20, validation=6, test=4, shards=2))
    assert sizes(data) == [16, 4, 4]
    assert data.class_names == NAMES
    assert data.splits is not None
    assert data.splits.test[range(4)].targets.tolist() == [0, 1, 0, 1]
    assert sizes(read(data_root := Path(str(data.root)), val_split="validation")) == [20, 6, 4]
    same, other = saved("b", train=20, validation=6, test=4, shards=2), saved("c", value=90, train=20, test=4, shards=2)
    assert read(same).fingerprint == read(data_root).fingerprint != read(other).fingerprint
    with pytest.raises(ValueError, match=r"root=.*: it has no dev, only train, validation, test; name a part with"):
        read(same, val_split="dev")


def test_a_saved_dataset_without_parts_has_a_fifth_held_out_to_test(saved: Callable[..., Path]) -> None:
    root = saved("a", 50, shards=3)
    data = read(root)
    assert sizes(data) == [32, 8, 10]
    assert "saved without parts, so 20% are held out to test" in data.caveats()
    again = read(root, seed=3, split_seed=1)
    assert data.splits is not None
    assert again.splits is not None
    assert torch.equal(data.splits.test[range(10)].inputs, again.splits.test[range(10)].inputs)
    with pytest.raises(ValueError, match="saved without parts, so leave"):
        read(root, streaming=True)


def test_a_saved_data_set_is_streamed(saved: Callable[..., Path]) -> None:
    data = read(saved("a", train=40, validation=6, test=4, shards=3), val_split="validation", streaming=True)
    seen = [int(image[0, 0, 0]) for batch in data.train_dataloader() for image in batch.inputs]
    assert sorted(seen) == sorted((5000 + i) % 256 for i in range(40))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: next(root.glob("train/*.arrow")).unlink(), r"arrow: it cannot be read \(.*\); fetch it again"),
        (lambda root: os.truncate(next(root.glob("train/*.arrow")), 300), r"arrow: it cannot be read \(.*\); fetch it"),
        (lambda root: (root / "train" / "state.json").write_text("{"), r"state.json: it cannot be read"),
        (lambda root: (root / "train" / "state.json").write_text("{}"), r"state.json: it cannot be read"),
        (lambda root: (root / "dataset_dict.json").write_text(""), r"dataset_dict.json: it cannot be read"),
    ],
)
def test_what_is_broken_in_a_saved_data_set_is_named(saved: Callable[..., Path], damage: Any, message: str) -> None:
    root = saved("a", train=20, test=4)
    damage(root)
    with pytest.raises(ValueError, match=message):
        read(root)


def test_saved_text_is_read_with_and_without_parts(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(40)]}) for name in "abc"}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    parts["a"].save_to_disk(tmp_path / "whole")
    names = {"train_split": "a", "val_split": "b", "test_split": "c"}
    data = HFText(root=str(tmp_path / "parts"), context_length=8, batch_size=4, **names)
    data.setup()
    assert data.splits is not None
    assert data.tokens.decode(data.splits.test.stream).startswith("c 0\n\nc 1\n\n")  # type: ignore[attr-defined]
    whole = HFText(root=str(tmp_path / "whole"), context_length=4, batch_size=4, val_fraction=0.1, test_fraction=0.1)
    whole.setup()
    assert whole.splits is not None
    assert whole.tokens.decode(whole.splits.test.stream).endswith("a 38\n\na 39")  # type: ignore[attr-defined]


# One way of reading for all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 6, 7, 13, 21, 39, 40])
def test_rows_from_any_number_on_are_the_same_in_all_formats(saved: Callable[..., Path], start: int) -> None:
    import datasets

    root = saved("a", 40, shards=3)
    arrow = file_table(str(root), "train")
    whole = datasets.load_from_disk(str(root))
    parts = [write(root.parent / "p" / f"train-{i}.parquet", [0]) for i in range(3)]
    for i, file in enumerate(parts):
        parquet.write_table(whole.shard(3, i, contiguous=True).with_format("arrow")[:], file, row_group_size=5)
    hub = [HubShard("hub", table, 40) for table in (whole, whole.to_iterable_dataset())]
    tables = [arrow, file_table(str(root.parent / "p"), "train"), *(Table("name=x", "train", [shard]) for shard in hub)]
    found = [[(i, row) for i, _, row in table.rows(["label", "image"], start)] for table in tables]
    expected = [(i, (i % 2, {"bytes": png(40, i), "path": None})) for i in range(start, 40)]
    assert found == [expected] * 4
    assert [type(shard) for shard in tables[0].shards] == [ArrowShard] * 3
    assert tables[1].where(20) == f"{parts[1]}, row 6"


def test_a_split_of_the_hub_is_decoded_and_streamed_as_files_are(saved: Callable[..., Path], tmp_path: Path) -> None:
    import datasets

    root = saved("a", train=20, val=6, test=4)
    loaded = datasets.load_from_disk(str(root))

    class Hub(HFImage):
        """Take the parts from memory in place of the network."""

        def table(self, split: str, *, streaming: bool = False) -> Table:
            part = loaded[split].to_iterable_dataset() if streaming else loaded[split]
            return Table("name=x", split, [HubShard(f"name=x, {split}", part, loaded[split].num_rows)])

    for settings in ({}, {"streaming": True}):
        ours, files = Hub(name="x", batch_size=4, val_split="val", **settings), read(root, val_split="val", **settings)
        ours.setup()
        for one, other in zip(ours.train_dataloader(), files.train_dataloader(), strict=True):
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.targets, other.targets)
    for name in loaded:
        loaded[name] = loaded[name].cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match="a stream from the Hub needs labels of type ClassLabel"):
        Hub(name="x", batch_size=4, val_split="val", streaming=True).setup()
    plain = Hub(name="x", batch_size=4, val_split="val")
    plain.setup()
    assert plain.class_names == ["0", "1"]


def test_a_name_on_the_hub_that_is_a_folder_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name=owner/images: this is a folder here, and a name"):
        hub_table("owner/images", "train")


def test_files_that_change_under_one_name_and_time_are_read_anew(tmp_path: Path) -> None:
    """The cache of `datasets` tells files apart by path and time; ours is the content."""
    for labels in ([0, 1] * 10, [1, 0] * 10):
        for split in ("train", "test"):
            os.utime(write(tmp_path / f"{split}.parquet", labels), ns=(10**18, 10**18))
        data = read(tmp_path)
        assert data.splits is not None
        assert data.splits.test[range(2)].targets.tolist() == labels[:2]


def test_documents_that_are_in_two_parts_are_counted(tmp_path: Path) -> None:
    documents = [f"document number {i}" for i in range(40)]
    for split, own in (
        ("train", [*documents, "", ""]),
        ("validation", ["", *documents[:1], "new"]),
        ("test", documents),
    ):
        parquet.write_table(pyarrow.table({"text": own}), tmp_path / f"{split}.parquet")
    data = HFText(root=str(tmp_path), context_length=4)
    data.setup()
    assert data.caveats() == [
        "1 of 3 documents of validation are training documents, too",
        "40 of 40 documents of test are training documents, too",
    ]
    parquet.write_table(pyarrow.table({"text": [*documents, *documents, ""]}), tmp_path / "train.parquet")
    one = HFText(root=str(tmp_path), context_length=4, val_split=None, test_split=None)
    one.setup()
    assert one.caveats() == ["40 of 81 documents are copies of others"]
