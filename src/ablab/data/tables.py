"""Tables of images or text in Hugging Face format: parquet files, `save_to_disk` folders, and the Hub."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from ablab.data.cache import content_key
from ablab.data.files import list_files
from ablab.data.hub import install_hint, load_split

ROWS = 256  # number of rows to read at once
END = 2**16  # bytes at the end of a file that identify it if it is too large to hash; parquet has its metadata there


class Shard(ABC):
    """Rows with named columns, in one file or on the Hub.

    Attributes:
        schema: the `pyarrow.Schema`.
        num_rows: the number of rows.
    """

    schema: Any
    num_rows: int

    @abstractmethod
    def __str__(self) -> str:
        """Return the location of the rows, for error messages."""

    @abstractmethod
    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield pyarrow record batches with the number of their first row; the first may start before row `start`."""

    def class_names(self, column: str) -> list[str] | None:
        """Return the class names of a label column from the Hub's metadata, or None."""
        try:
            metadata = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            feature = metadata.get("info", {}).get("features", {}).get(column)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{self}: its Hub metadata cannot be read ({error}); write the file again, with them or without"
            ) from error
        return feature["names"] if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None


class HubShard(Shard):
    """A split loaded by `datasets`, streaming or not."""

    def __init__(self, title: str, table: Any, num_rows: int) -> None:
        self.title = title
        self.table = table
        self.schema = table.features.arrow_schema
        self.num_rows = num_rows

    def __str__(self) -> str:
        return self.title

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Any]]:
        rows = self.table.select_columns(list(columns)).with_format("arrow")
        for batch in (rows.skip(start) if start else rows).iter(ROWS):
            yield start, batch
            start += batch.num_rows


class FileShard(Shard):
    """Base class of shards in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __str__(self) -> str:
        return str(self.file)

    @abstractmethod
    def has_nulls(self, column: str, field: str) -> bool:
        """Return whether a field of a struct column may have nulls."""


class ParquetShard(FileShard):
    """A parquet file."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        with explain_read_errors(file), self.open_file() as opened:
            self.schema, self.metadata = opened.schema_arrow, opened.metadata
        self.num_rows = self.metadata.num_rows

    def open_file(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.file)

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Any]]:
        starts = list(accumulate((self.metadata.row_group(i).num_rows for i in self.row_groups), initial=0))
        groups = [i for i in self.row_groups if starts[i + 1] > start]
        if not groups:
            return
        first = starts[groups[0]]
        with explain_read_errors(self.file), self.open_file() as opened:
            for batch in opened.iter_batches(ROWS, row_groups=groups, columns=list(columns)):
                yield first, batch
                first += batch.num_rows

    @property
    def row_groups(self) -> range:
        return range(self.metadata.num_row_groups)

    def has_nulls(self, column: str, field: str) -> bool:
        for group in map(self.metadata.row_group, self.row_groups):
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema == f"{column}.{field}":
                    statistics = chunk.statistics
                    if statistics is None or not statistics.has_null_count or statistics.null_count:
                        return True
        return False


class ArrowShard(FileShard):
    """An arrow file in the streaming format, as `save_to_disk` writes it."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        import pyarrow

        with explain_read_errors(file), pyarrow.memory_map(str(file)) as source:
            reader = pyarrow.ipc.open_stream(source)
            self.schema = reader.schema
            self.num_rows = sum(batch.num_rows for batch in reader)

    def batches(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Any]]:
        import pyarrow

        first = 0
        with explain_read_errors(self.file), pyarrow.memory_map(str(self.file)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                if first + batch.num_rows > start:
                    for piece in range(0, batch.num_rows, ROWS):
                        yield first + piece, batch.slice(piece, ROWS).select(list(columns))
                first += batch.num_rows

    def has_nulls(self, column: str, field: str) -> bool:
        import pyarrow

        # reads the null bitmaps only
        with explain_read_errors(self.file), pyarrow.memory_map(str(self.file)) as source:
            stream = pyarrow.ipc.open_stream(source)
            return any(batch.column(column).field(field).null_count for batch in stream)


class Table:
    """A split: one or more shards, sorted by name.

    Args:
        source: the setting that names the data, for error messages: `root=…`.
        split: name of the split.
        shards: shards of the split.
    """

    def __init__(self, source: str, split: str, shards: Sequence[Shard]) -> None:
        self.source = source
        self.split = split
        self.shards = shards
        self.starts = list(accumulate((shard.num_rows for shard in shards), initial=0))

    @property
    def num_rows(self) -> int:
        return self.starts[-1]

    @property
    def non_empty(self) -> list[Shard]:
        """Shards with rows; empty shards may have other column types."""
        return [shard for shard in self.shards if shard.num_rows]

    @property
    def files(self) -> list[Path]:
        return [shard.file for shard in self.shards if isinstance(shard, FileShard)]

    def where(self, i: int) -> str:
        """Return the file of a row and the row number in it, for error messages."""
        number = bisect_right(self.starts, i) - 1
        return f"{self.shards[number]}, row {i - self.starts[number]}"

    def check_columns(self, **columns: str) -> None:
        """Check that the table has rows, and that all shards have the columns.

        Args:
            columns: column names, by the settings that name them.

        Raises:
            ValueError: they do not; the message lists the existing columns.
        """
        if not self.non_empty:
            raise ValueError(f"{self.source}: the {self.split} split has no rows; export it again, with its rows")
        for shard in self.non_empty:
            names = shard.schema.names
            if twice := [column for column in columns.values() if names.count(column) > 1]:
                raise ValueError(f"{shard}: it has {names.count(twice[0])} columns {twice[0]}; rename them")
            if missing := sorted(set(columns.values()) - set(names)):
                settings = " and ".join(f"data.{setting}" for setting in columns)
                raise ValueError(
                    f"{self.source}: the {self.split} split has the columns {', '.join(names)}, and "
                    f"{', '.join(missing)} is missing in {shard}; set {settings}"
                )

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of a column, row by row."""
        for shard in self.non_empty:
            for _, batch in shard.batches([name]):
                yield from batch.column(0).to_pylist()

    def rows(self, columns: Sequence[str], start: int = 0) -> Iterator[tuple[int, Shard, tuple[Any, ...]]]:
        """Yield the number, shard and values (in the order of `columns`) of each row from `start` on."""
        for shard, begin in zip(self.shards, self.starts, strict=False):
            if not shard.num_rows or begin + shard.num_rows <= start:
                continue
            for first, batch in shard.batches(columns, max(0, start - begin)):
                skipped = max(0, start - begin - first)
                rest = batch.slice(skipped)
                values = zip(*(rest.column(name).to_pylist() for name in columns), strict=True)
                for number, row in enumerate(values, start=begin + first + skipped):
                    yield number, shard, row

    def external_files(self, column: str) -> list[Path]:
        """Return the image files that rows refer to by path, in the order of the rows.

        Raises:
            ValueError: a file is missing, or the path is a URL.
        """
        found: list[Path] = []
        missing: list[tuple[str, Path]] = []
        for shard, begin in zip(self.shards, self.starts, strict=False):
            if isinstance(shard, HubShard) or not shard.num_rows or not points_to_files(shard, column):
                continue
            for first, batch in shard.batches([column]):
                for i, value in enumerate(batch.column(0).to_pylist(), start=begin + first):
                    image = image_source(value, shard, partial(self.where, i))
                    if isinstance(image, Path):
                        found.append(image)
                        if not image.is_file():
                            missing.append((self.where(i), image))
        if missing:
            where, image = missing[0]
            raise ValueError(
                f"{where}: it points to the image {image}, which is not there ({len(missing)} such of "
                f"{self.num_rows} rows); put the files there, or export with Dataset.save_to_disk, which embeds images"
            )
        return found

    @cached_property
    def file_ends(self) -> list[bytes | int]:
        """Size and last 64 KiB of each file, which identify files that are too large to hash."""
        return [part for file in self.files for part in (file.stat().st_size, end_of(file))]


def points_to_files(shard: Shard, column: str) -> bool:
    """Return whether some rows may have the path of an image instead of its bytes."""
    from pyarrow import types

    kind = shard.schema.field(column).type
    if not types.is_struct(kind):
        return is_text(kind)
    names = [field.name for field in kind]
    assert isinstance(shard, FileShard)
    return "path" in names and ("bytes" not in names or shard.has_nulls(column, "bytes"))


def image_source(value: Any, shard: Shard, where: Callable[[], str]) -> bytes | Path | None:
    """Return the bytes or the file of an image, from a value of an image column.

    Args:
        value: bytes, a path relative to the table's folder, or a dict with both, as in `datasets.Image`.
        shard: the shard of the row.
        where: returns the location of the row, for error messages.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str):
        return value
    if "://" in value:
        raise ValueError(
            f"{where()}: its image is at {value}, and images are not downloaded; export with Dataset.save_to_disk, "
            "which embeds them"
        )
    return shard.file.parent / value if isinstance(shard, FileShard) else Path(value)


def check_images(tables: Sequence[Table], column: str) -> None:
    """Check that a column has bytes, paths, or structs of both as in `datasets.Image`."""
    from pyarrow import types

    for table in tables:
        for shard in table.non_empty:
            kind = shard.schema.field(column).type
            fields = {field.name for field in kind} if types.is_struct(kind) else set()
            if not (fields & {"bytes", "path"} or is_binary(kind) or is_text(kind)):
                raise ValueError(
                    f"image_column={column}: {shard} has {kind} there, which is no image; choose a column of encoded "
                    "images (PNG, JPEG, …) or of their paths"
                )


class Labels:
    """The classes of a label column, over all splits of a data set.

    Class names from the Hub's metadata keep their order. Otherwise, the classes are the sorted distinct labels: numbers
    by value, strings by code point ("10" before "2").

    Args:
        tables: the splits.
        column: name of the label column.

    Raises:
        ValueError: labels are neither integers, strings nor booleans, or files have different kinds of labels.
    """

    def __init__(self, tables: Sequence[Table], column: str) -> None:
        self.column = column
        first, kind = self.common_kind(tables)
        self.are_named = isinstance(kind, list)
        if self.are_named:
            self.names, self.values = kind, list(range(len(kind)))
            return
        values: set[Any] = set()
        for table in tables:
            values.update(table.column(column))
        self.values = sorted(value for value in values if value not in (None, ""))
        self.names = [str(value) for value in self.values]
        if not self.values:
            raise ValueError(f"label_column={column}: {first} has no labels, only empty fields; choose another column")

    def common_kind(self, tables: Sequence[Table]) -> tuple[Shard, Any]:
        """Return the first shard and the kind of its labels, which all shards must share."""
        shards = [shard for table in tables for shard in table.non_empty]
        kinds = [self.kind(shard) for shard in shards]
        for shard, kind in zip(shards, kinds, strict=True):
            if kind != kinds[0]:
                raise ValueError(
                    f"label_column={self.column}: {shard} has {describe_labels(kind)}, and {shards[0]} has "
                    f"{describe_labels(kinds[0])}; export both with the same features, their classes in one order"
                )
        return shards[0], kinds[0]

    def kind(self, shard: Shard) -> list[str] | str:
        from pyarrow import types

        if (names := shard.class_names(self.column)) is not None:
            return names
        kind = shard.schema.field(self.column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        for name, fits in (("integers", types.is_integer), ("booleans", types.is_boolean), ("strings", is_text)):
            if fits(kind):
                return name
        raise ValueError(
            f"label_column={self.column}: {shard} has {kind} there; a class is an integer, a string or a boolean, so "
            "cast the labels, or choose another column"
        )

    @cached_property
    def numbers(self) -> dict[Any, int]:
        """Class index of each label."""
        return {value: number for number, value in enumerate(self.values)}

    def number(self, label: Any, where: Callable[[], str]) -> int:
        """Return the class index of a label.

        Args:
            label: the value in the table.
            where: returns the location of the row, for error messages.
        """
        if label not in self.numbers:
            known = f"from 0 to {len(self.names) - 1}" if self.are_named else "a class"
            raise ValueError(f"{where()}: its label {label!r} is not {known}; fix it, or leave the row out")
        return self.numbers[label]

    def of(self, table: Table) -> list[int]:
        """Return the class indices of all rows."""
        return [self.number(label, partial(table.where, i)) for i, label in enumerate(table.column(self.column))]

    @property
    def note(self) -> list[str]:
        """A remark on integer labels that are not class indices themselves; may be empty."""
        if self.are_named or not isinstance(self.values[0], int) or self.values == list(range(len(self.values))):
            return []
        shown = self.names if len(self.names) <= 6 else [*self.names[:4], "…", self.names[-1]]
        return [f"the labels {', '.join(shown)} are the classes 0 to {len(self.names) - 1}"]


def describe_labels(kind: list[str] | str) -> str:
    return f"the classes {', '.join(kind)}" if isinstance(kind, list) else f"{kind} as labels, without class names"


def is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


# Opening tables -----------------------------------------------------------------------------------------------------


def hub_table(name: str | None, split: str, config: str | None = None, *, streaming: bool = False) -> Table:
    """Load a split from the Hub.

    Raises:
        ValueError: the split cannot be loaded, or its number of rows is unknown when streaming.
    """
    if name and Path(name).is_dir():
        raise ValueError(
            f"name={name}: this is a folder here, and a name on the Hub; give a folder with parquet files as data.root"
        )
    table = load_split(name, split, config, streaming=streaming)
    if not streaming:
        num_rows = table.num_rows
    elif not (num_rows := table.info.splits[split].num_examples if table.info.splits else 0):
        raise ValueError(f"name={name}: it does not say how many rows {split} has; set data.streaming=false")
    return Table(f"name={name}", split, [HubShard(f"name={name}, {split}", table, num_rows)])


def file_table(root: str, split: str) -> Table:
    """Open a split in a folder of parquet files, or in a folder written by `save_to_disk`.

    Raises:
        ValueError: the folder or split does not exist, files belong to different exports, or a file cannot be read.
    """
    folder = Path(root)
    if not folder.is_dir():
        what = "this is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ValueError(f"root={root}: {what}; give one with the parquet files")
    with install_hint():
        import pyarrow  # noqa: F401
    if (folder / "dataset_dict.json").exists():
        parts = read_json(folder / "dataset_dict.json", "splits")
        if split not in parts:
            raise ValueError(f"root={root}: it has no {split}, only {', '.join(parts)}; name a part with data.…_split")
        return Table(f"root={root}", split, saved_shards(folder / split))
    if is_unsplit(root):
        return Table(f"root={root}", split, saved_shards(folder))
    files = parquet_files(root, split)
    shards = [ParquetShard(file) for file in files]
    check_copies(root, [shard.file for shard in shards if shard.num_rows])
    return Table(f"root={root}", split, shards)


def is_unsplit(root: str | None) -> bool:
    """Return whether a folder is a `datasets.Dataset` saved without splits."""
    return root is not None and (Path(root) / "state.json").exists()


def saved_shards(folder: Path) -> list[Shard]:
    """Open the files of a `datasets.Dataset` written by `save_to_disk`."""
    return [ArrowShard(folder / file["filename"]) for file in read_json(folder / "state.json", "_data_files")]


def read_json(file: Path, key: str) -> Any:
    with explain_read_errors(file):
        return json.loads(file.read_text(encoding="utf-8"))[key]


def parquet_files(root: str, split: str) -> list[Path]:
    """Return the files of a split, `<split>.parquet` or `<split>-<anything>.parquet`, sorted by name.

    Raises:
        ValueError: there are no files, files are in several folders or from different exports, or a shard is missing.
    """
    everything = [file for file in list_files(Path(root)).files if file.suffix == ".parquet"]
    files = [file for file in everything if file.stem == split or file.name.startswith(f"{split}-")]
    if not files:
        others = ", ".join(sorted({file.stem.partition("-")[0] for file in everything}))
        there = f"; there is {others}, and data.…_split names another part" if others else ""
        raise ValueError(
            f"root={root}: no {split}.parquet or {split}-*.parquet there{there or '; give the folder that has them'}"
        )
    if len(folders := sorted({file.parent for file in files})) > 1:
        raise ValueError(f"root={root}: {', '.join(map(str, folders))} all have files of {split}; give one of them")
    check_shards(root, split, files)
    return files


def check_shards(root: str, split: str, files: Sequence[Path]) -> None:
    """Check that files are a single export: one file, all N numbered shards, or files without numbers."""
    matches = [re.match(rf"{re.escape(split)}-(\d+)-of-(\d+)\b", file.stem) for file in files]
    totals = {int(match[2]) for match in matches if match}
    numbers = [int(match[1]) for match in matches if match]
    is_single = any(file.stem == split for file in files)
    if len(files) > 1 and (is_single or len(totals) > 1 or 0 < len(numbers) < len(files)):
        raise ValueError(
            f"root={root}: {join_file_names(files)} are files of several exports of {split}; keep the files of one"
        )
    for total in totals:
        first = 1 if total in numbers and 0 not in numbers else 0  # some tools number shards from 1
        expected = range(first, first + total)
        if missing := sorted(set(expected) - set(numbers)):
            name = f"{split}-{missing[0]:05}-of-{total:05}.parquet"
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise ValueError(
                f"root={root}: of the {total} files of {split}, {name}{more} missing; fetch all, or export again"
            )
        if len(numbers) > total:
            raise ValueError(
                f"root={root}: {join_file_names(files)} are more than the {total} files of {split}; keep those of one "
                "export"
            )


def check_copies(root: str, files: Sequence[Path]) -> None:
    """Check that no file is a copy of another."""
    by_end: dict[tuple[int, bytes], Path] = {}
    for file in files:
        first = by_end.setdefault((file.stat().st_size, end_of(file)), file)
        if first is not file and content_key(first) == content_key(file):
            raise ValueError(f"root={root}: {file.name} is a copy of {first.name}; remove one of them")


def join_file_names(files: Sequence[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names if len(names) <= 6 else [*names[:3], "…", *names[-2:]])


def end_of(file: Path) -> bytes:
    """Return the last 64 KiB of a file."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - END))
        return opened.read()


@contextmanager
def explain_read_errors(file: Path) -> Iterator[None]:
    """Convert read errors to a ValueError that names the file and a remedy."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException, json.JSONDecodeError, UnicodeDecodeError, LookupError) as error:
        remedy = "fetch it again"
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            remedy = "it only points to the data: run git lfs pull in its folder"
        raise ValueError(f"{file}: it cannot be read ({' '.join(str(error).split())}); {remedy}") from error
