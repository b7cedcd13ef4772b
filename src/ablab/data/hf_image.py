"""Image data sets from the Hugging Face Hub, parquet files or `save_to_disk` folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab.data.batch import Samples
from ablab.data.cache import content_key
from ablab.data.encoded_images import Encoded, EncodedImages, load_image
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, OfficialSplits, hold_out
from ablab.data.stream import ImageStream, Row
from ablab.data.tables import Labels, Shard, Table, check_images, file_table, hub_table, image_source, is_unsplit
from ablab.digest import digest

VALIDATION_NAMES = ("val", "valid", "validation", "dev")


class HFImage(EncodedImages):
    """An image classification data set in Hugging Face format; the official splits are kept.

    Images are encoded bytes or file paths; relative paths are relative to the table's folder. Labels are ClassLabels,
    integers, strings or booleans, see `Labels`.

    Args:
        name: name of the data set on the Hub, for example "uoft-cs/cifar10".
        root: a folder with parquet files, `<split>.parquet` or `<split>-….parquet`, or a folder written by
            `datasets.save_to_disk`; if that has no splits, a fifth is held out for testing. None loads from the Hub.
        image_column, label_column: names of the columns.
        train_split, test_split: names of the splits.
        val_split: name of the validation split; None holds val_fraction of the training split out.
        streaming: decode training images on the fly, for data sets too large to keep decoded. The standardization then
            uses the first 4,096 images, and num_workers is the number of decoding threads.
        shuffle_block: number of rows to read ahead and shuffle when streaming.
        settings: see `EncodedImages`, `LabelledData` and `DataModule`.

    Raises:
        ValueError: a folder, file or column is missing, files belong to different exports, labels are not classes, or a
            file or image cannot be read.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        root: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str = "test",
        streaming: bool = False,
        shuffle_block: int = 10_000,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if not name and not root:
            raise ValueError("name=null, root=null: say which data set of the Hub, or give a folder with parquet files")
        if shuffle_block < 1:
            raise ValueError(f"shuffle_block={shuffle_block}: at least 1 row is needed")
        self.hub_name = name
        self.root = root
        self.image_column = image_column
        self.label_column = label_column
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.streaming = streaming
        self.shuffle_block = shuffle_block
        self.table_notes: list[str] = []

    def load(self) -> OfficialSplits:
        if is_unsplit(self.root):
            return self.load_unsplit()
        test = self.table(self.test_split)
        train = self.table(self.train_split, streaming=self.streaming)
        val = None if self.val_split is None else self.table(self.val_split)
        labels = self.read_labels([table for table in (train, val, test) if table is not None])
        if self.streaming:
            official_train: Samples | ImageStream = self.stream(train, labels)
        else:
            official_train = self.samples(train, labels)
        return OfficialSplits(
            official_train, self.samples(test, labels), None if val is None else self.samples(val, labels)
        )

    def load_unsplit(self) -> OfficialSplits:
        """Load a data set that was saved without splits; the held-out test images are fixed."""
        if self.streaming or self.val_split is not None:
            raise ValueError(
                f"{self.source}: it was saved without parts, so leave data.val_split at null and data.streaming at "
                "false, or save a DatasetDict with its parts"
            )
        table = self.table(self.train_split)
        everything = self.samples(table, self.read_labels([table]))
        self.table_notes = [*self.table_notes, f"saved without parts, so {TEST_FRACTION:.0%} are held out to test"]
        rest, test = hold_out(everything, TEST_FRACTION, TEST_SEED, "the test part")
        return OfficialSplits(everything.part(rest), everything.part(test))

    def table(self, split: str, *, streaming: bool = False) -> Table:
        if self.root is None:
            table = hub_table(self.hub_name, split, streaming=streaming)
        else:
            table = file_table(self.root, split)
        table.check_columns(image_column=self.image_column, label_column=self.label_column)
        return table

    def read_labels(self, tables: Sequence[Table]) -> Labels:
        """Determine the classes over all splits, and add remarks on the splits."""
        check_images(tables, self.image_column)
        if self.streaming and self.root is None and tables[0].shards[0].class_names(self.label_column) is None:
            raise ValueError(
                f"label_column={self.label_column}: a stream from the Hub needs labels of type ClassLabel, as its "
                "classes have to be known at the start; set data.streaming=false"
            )
        labels = Labels(tables, self.label_column)
        self.class_names = labels.names
        self.table_notes = [*labels.note, *self.describe_unused_splits()]
        if self.streaming:
            what = "sizes and ends of files, and all labels" if self.root else "the version on the Hub"
            self.table_notes = [
                *self.table_notes,
                f"the fingerprint of the streamed part covers {what}, not every image",
            ]
        return labels

    def describe_unused_splits(self) -> list[str]:
        """Describe validation splits that exist but are not used."""
        found = []
        if self.root is not None and self.val_split is None and not is_unsplit(self.root):
            for split in {*VALIDATION_NAMES} - {self.train_split, self.test_split}:
                with suppress(ValueError):  # no such split
                    num_rows = file_table(self.root, split).num_rows
                    found.append(f"{num_rows:,} of {split} not used, data.val_split={split} validates on them")
        return sorted(found)

    def external_files(self, table: Table) -> list[Path]:
        """Return the image files that a table refers to, and record them, so that a sweep notices changes."""
        found = table.external_files(self.image_column)
        self.extra_files = [*self.extra_files, *found]
        return found

    def samples(self, table: Table, labels: Labels) -> Samples:
        """Decode a split, or load it from the cache; the key covers the content of all files and external images."""
        columns = (self.image_column, self.label_column)
        if self.root is None:
            [shard] = table.shards
            content: list[str | Path] = ["hub", shard.table._fingerprint]  # type: ignore[attr-defined]
        else:
            content = ["files", *table.files, *self.external_files(table)]
        key = self.cache_key("table", *columns, *labels.names, *content)

        def read() -> tuple[Encoded, list[str]]:
            images = [self.encoded_image(table, *row) for row in table.rows([self.image_column])]
            return Encoded(images, labels.of(table), table.where), labels.names

        return self.decode_split(key, read)[0]

    def stream(self, table: Table, labels: Labels) -> ImageStream:
        """Make a training split that is decoded on the fly."""
        if self.root is None:
            [shard] = table.shards
            info = shard.table.info  # type: ignore[attr-defined]
            name = content_key(
                str(self.hub_name), table.split, str(info.version), *sorted(info.download_checksums or [])
            )
        else:
            sizes = [file.stat().st_size for file in self.external_files(table)]
            name = content_key(digest(torch.tensor(labels.of(table))), *table.file_ends, *sizes)

        def rows(start: int) -> Iterator[Row]:
            for number, shard, (image, label) in table.rows([self.image_column, self.label_column], start):
                target = labels.number(label, partial(table.where, number))
                yield Row(number, self.encoded_image(table, number, shard, (image,)), target)

        def decode(row: Row) -> Tensor:
            one = Encoded([row.image], [row.target], lambda _: table.where(row.number))
            return load_image(one, 0, self.image_size, self.in_channels)

        return ImageStream(rows, table.num_rows, decode, block_size=self.shuffle_block, name=name)

    @property
    def source(self) -> str:
        """The setting that names the data, for error messages."""
        return f"root={self.root}" if self.root else f"name={self.hub_name}"

    def encoded_image(self, table: Table, i: int, shard: Shard, row: tuple[Any, ...]) -> bytes | Path:
        """Return the bytes or the file of an image."""
        image = image_source(row[0], shard, partial(table.where, i))
        if image is None:
            raise ValueError(f"{table.where(i)}: there is no image in {self.image_column}; leave the row out")
        return image

    def caveats(self) -> list[str]:
        return [*super().caveats(), *self.table_notes]
