"""Any image data set in the layout of the Hugging Face Hub: parquet files with encoded images."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from ablab.data.batch import Samples
from ablab.data.cache import content_key
from ablab.data.encoded_images import Encoded, EncodedImages, load_image
from ablab.data.hub import install_hint, load_split
from ablab.data.labelled import Official
from ablab.data.stream import ImageStream, Row


class HFImage(EncodedImages):
    """Images and labels by the names of their columns; the official parts are kept.

    Args:
        name: the data set's name on the Hub, for example "uoft-cs/cifar10".
        root: a folder with its parquet files, `<split>.parquet` or `<split>-….parquet`; None asks the Hub.
        image_column, label_column: their names.
        train_split, test_split: names of the parts.
        val_split: name of the validation part; None holds val_fraction out of the training part.
        streaming: decode training images as they are used, for data sets that are too large to keep decoded. The
            standardization is then that of the first 4,096. num_workers counts the threads that decode.
        shuffle_block: rows that are read ahead and shuffled, in streaming.
        settings: see `EncodedImages`, `LabelledData` and `DataModule`.

    Raises:
        ValueError: a missing folder, file or column, labels without names, a file or an image that cannot be read.
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

    def load(self) -> Official:
        test, self.class_names = self.split(self.test_split)
        train, others = self.stream(self.train_split) if self.streaming else self.split(self.train_split)
        self.check_classes(self.train_split, others)
        val = None
        if self.val_split is not None:
            val, others = self.split(self.val_split)
            self.check_classes(self.val_split, others)
        return Official(train, test, val)

    def check_classes(self, split: str, class_names: list[str]) -> None:
        """Refuse a split whose numbers stand for other classes."""
        if class_names != self.class_names:
            raise ValueError(
                f"{self.source}: the classes of {split} ({', '.join(class_names)}) are not those of {self.test_split} "
                f"({', '.join(self.class_names)}), or in another order"
            )

    def split(self, split: str) -> tuple[Samples, list[str]]:
        columns = (self.image_column, self.label_column)
        if self.root is not None:  # the files' content is the key: once decoded, nothing has to read parquet
            files = parquet_files(self.root, split)
            return self.decoded(self.key("parquet", *columns, *files), lambda: self.encoded(split, files))
        table = load_split(self.hub_name, split)
        return self.decoded(self.key("hub", *columns, table._fingerprint), lambda: self.encoded(split, [], table))

    def stream(self, split: str) -> tuple[ImageStream, list[str]]:
        """A split that is decoded as it is used, and the names of its classes."""
        if self.root is None:
            table = load_split(self.hub_name, split, streaming=True)
            num = table.info.splits[split].num_examples if table.info.splits else 0
            name = content_key(
                str(self.hub_name), split, str(table.info.version), *sorted(table.info.download_checksums or [])
            )
        else:
            files = parquet_files(self.root, split)
            table = read_parquet(self.root, split, files, streaming=True)
            num = sum(map(num_rows, files))
            name = content_key(*(end_of(file) for file in files))  # reading them whole could take hours
        import datasets

        if not num:
            raise ValueError(f"{self.source}: it does not say how many rows {split} has; set data.streaming=false")
        class_names = self.check_columns(split, table.column_names, table.features)
        encoded = table.select_columns([self.image_column, self.label_column])
        encoded = encoded.cast_column(self.image_column, datasets.Image(decode=False))

        def rows(start: int) -> Iterator[Row]:
            for number, row in enumerate(encoded.skip(start), start=start):
                image = self.encoded_image(row[self.image_column], lambda i: f"{self.source}, {split} row {i}", number)
                yield Row(number, image, row[self.label_column])

        def decode(row: Row) -> Tensor:
            one = Encoded([row.image], [row.target], lambda _: f"{self.source}, {split} row {row.number}")
            check_label(one.where(0), row.target, len(class_names))
            return load_image(one, 0, self.image_size, self.in_channels)

        return ImageStream(rows, num, decode, block_size=self.shuffle_block, name=name), class_names

    @property
    def source(self) -> str:
        """Where the data are from, as it is set."""
        return f"root={self.root}" if self.root else f"name={self.hub_name}"

    def encoded(self, split: str, files: Sequence[Path], table: Any = None) -> tuple[Encoded, list[str]]:
        """The images of a split as bytes, and the names of its classes."""
        table = read_parquet(self.root, split, files) if table is None else table
        import datasets

        class_names = self.check_columns(split, table.column_names, table.features)
        images = table.cast_column(self.image_column, datasets.Image(decode=False))[self.image_column]
        starts = list(accumulate(map(num_rows, files), initial=0))

        def where(i: int) -> str:
            if not files:
                return f"{self.source}, {split} row {i}"
            file = bisect_right(starts, i) - 1
            return f"{files[file]}, row {i - starts[file]}"

        found = [self.encoded_image(image, where, i) for i, image in enumerate(images)]
        targets = table[self.label_column][:]
        for i, target in enumerate(targets):
            check_label(where(i), target, len(class_names))
        return Encoded(found, targets, where), class_names

    def encoded_image(self, image: dict[str, Any] | None, where: Callable[[int], str], i: int) -> bytes | Path:
        """The bytes of an image, or its file."""
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError(f"{where(i)}: there is no image in {self.image_column}; leave the row out")
        return Path(image["path"]) if image["bytes"] is None else image["bytes"]

    def check_columns(self, split: str, names: Sequence[str], features: Any) -> list[str]:
        """The names of the classes."""
        import datasets

        if missing := {self.image_column, self.label_column} - set(names):
            raise ValueError(
                f"{self.source}: the {split} split has the columns {', '.join(names)}, and "
                f"{', '.join(sorted(missing))} is missing; name them with data.image_column and data.label_column"
            )
        if not isinstance(features[self.image_column], datasets.Image):
            raise ValueError(f"image_column={self.image_column}: {features[self.image_column]} is no image")
        label = features[self.label_column]
        if not isinstance(label, datasets.ClassLabel):
            raise ValueError(
                f"label_column={self.label_column}: {label} has no names for its classes; choose a column of type "
                "ClassLabel"
            )
        names_of_classes: list[str] = label.names
        return names_of_classes


def check_label(where: str, label: int | None, num_classes: int) -> None:
    if label is None or not 0 <= label < num_classes:
        raise ValueError(
            f"{where}: its label {label} is not from 0 to {num_classes - 1}; mend it, or leave the row out"
        )


def parquet_files(root: str, split: str) -> list[Path]:
    """The files of a split, `<split>.parquet` or `<split>-<anything>.parquet`, in the order of their names."""
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"root={root}: there is no such folder; give one with the parquet files")
    found = [file for pattern in (f"{split}.parquet", f"{split}-*.parquet") for file in folder.rglob(pattern)]
    folders = sorted({file.parent for file in found})
    if not found:
        raise ValueError(f"root={root}: no {split}.parquet or {split}-*.parquet there; give the folder that has them")
    if len(folders) > 1:
        raise ValueError(f"root={root}: {', '.join(map(str, folders))} all have files of {split}; give one of them")
    return sorted(found)


def read_parquet(root: str | None, split: str, files: Sequence[Path], *, streaming: bool = False) -> Any:
    """A split as a `datasets.Dataset`; streaming gives its `IterableDataset`."""
    with install_hint():
        import datasets
    datasets.disable_progress_bars()
    try:
        paths = {split: [str(file) for file in files]}
        return datasets.load_dataset("parquet", data_files=paths, split=split, streaming=streaming)
    except Exception as error:  # the library raises whatever its parts raise
        raise ValueError(
            f"root={root}: {', '.join(map(str, files))} cannot be read as parquet ({error.__cause__ or error}); "
            "fetch it again"
        ) from error


def end_of(file: Path) -> bytes:
    """The last 64 KiB of a file: of parquet, the statistics and places of all its columns."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - 2**16))
        return opened.read()


def num_rows(file: Path) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(file).num_rows
