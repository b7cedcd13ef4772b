"""Tables from CSV, Parquet or npz files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from ablab.data.labelled import join_names
from ablab.data.vectors import Part, Rows, TargetKind, Vectors

if TYPE_CHECKING:  # pandas is slow to import; other data sets do not need it
    from pandas import DataFrame, Series

LARGEST = float(np.finfo(np.float32).max)
SUFFIXES = (".csv", ".parquet", ".npz")


class Table(Vectors):
    """A table whose rows are samples, for classification, multi-label classification or regression.

    Args:
        train_file: a .csv, .parquet or .npz file; .npz files have arrays `x` `(N, F)` and `y` `(N)` or `(N, K)`.
        val_file: file with the validation rows; None holds out `val_fraction` of the training rows.
        test_file: file with the test rows; None holds out a fixed fifth of the training rows.
        split_column: column of `train_file` with train, val or test for each row, instead of separate files.
        target: target column or columns; None uses `y` of an .npz file.
        features: feature columns; None uses all other numeric columns.
        target_kind: "number" (regression of one or more columns), "class" (one column of integers, text or booleans) or
            "multilabel" (columns of 0 and 1).
        settings: see `Vectors` and `DataModule`.

    Shape:
        inputs `(N, F)`; targets `(N)` with class indices, or `(N, K)` with labels or numbers

    Raises:
        ValueError: a file or column is missing, or a value is missing or not a number; the message names file, row and
            column. Rows are counted from 1, without the header.
    """

    def __init__(
        self,
        *,
        train_file: str,
        val_file: str | None = None,
        test_file: str | None = None,
        split_column: str | None = None,
        target: str | Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        target_kind: TargetKind = "number",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if target_kind not in get_args(TargetKind):
            raise ValueError(f"target_kind={target_kind}: there are {', '.join(get_args(TargetKind))}")
        if split_column is not None and (val_file, test_file) != (None, None):
            raise ValueError(
                f"split_column={split_column}: it divides train_file; set val_file and test_file to null, or leave "
                "split_column out"
            )
        self.target_kind = target_kind
        self.files: dict[Part, str | None] = {"train": train_file, "val": val_file, "test": test_file}
        self.split_column = split_column
        self.target = [target] if isinstance(target, str) else target
        self.features = features

    def load(self) -> Mapping[Part, Rows]:
        sources: dict[Part, Source] = {
            part: Source(f"{part}_file", Path(file)) for part, file in self.files.items() if file is not None
        }
        whole = sources["train"]
        if self.split_column is not None:
            sources = whole.split_by_column(self.split_column)
        targets = self.target_columns(whole)
        self.feature_names = self.feature_columns(whole, targets)
        if self.target_kind == "class":
            return self.rows_of_classes(sources, targets)
        self.target_names = targets
        return {part: self.rows(source) for part, source in sources.items()}

    def target_columns(self, source: Source) -> list[str]:
        if self.target is None:
            if source.path.suffix.lower() != ".npz":
                raise ValueError(f"target=null: name the column to predict; {source.path} has {source.columns}")
            targets = [column for column in source.frame.columns if column.startswith("y")]
        else:
            targets = list(self.target)
        source.check_columns("target", targets)
        if self.target_kind == "class" and len(targets) != 1:
            raise ValueError(
                f"target=[{', '.join(targets)}]: classes are in one column; name one, or set "
                "data.target_kind=multilabel or number"
            )
        return targets

    def feature_columns(self, source: Source, targets: list[str]) -> list[str]:
        if self.features is not None:
            source.check_columns("features", self.features)
            if both := sorted({*self.features} & {*targets, self.split_column}):
                raise ValueError(f"features: {both[0]} is the target or the split; leave it out")
            return list(self.features)
        others = [column for column in source.frame.columns if column not in (*targets, self.split_column)]
        found = [column for column in others if holds_numbers(source.frame[column])]
        if not found:
            raise ValueError(f"features=null: {source.path} has no column of numbers beside the target")
        if left_out := [column for column in others if column not in found]:
            self.remarks += (f"columns that hold no numbers are left out: {join_names(left_out)}",)
        return found

    def rows(self, source: Source) -> Rows:
        targets = source.numbers("target", self.target_names)
        if self.target_kind == "multilabel":
            wrong = np.argwhere((targets != 0) & (targets != 1))
            if len(wrong):
                row, column = wrong[0]
                source.fail(row, self.target_names[column], "a label is 0 or 1; fix it, or leave the row out")
        return Rows(source.numbers("features", self.feature_names), targets)

    def rows_of_classes(self, sources: Mapping[Part, Source], targets: list[str]) -> dict[Part, Rows]:
        """Return rows with class indices; classes are sorted, integers by value and text by code point."""
        [column] = targets
        labels = {part: source.labels(column) for part, source in sources.items()}
        classes = sorted(set(labels["train"]))
        numbers = {label: number for number, label in enumerate(classes)}
        for part, source in sources.items():
            for row, label in enumerate(labels[part]):
                if label not in numbers or type(label) is not type(classes[0]):
                    source.fail(row, column, "no training row has this class; give some, or leave the row out")
        self.target_names = [str(label) for label in classes]
        return {
            part: Rows(
                source.numbers("features", self.feature_names),
                np.array([numbers[label] for label in labels[part]], dtype=np.int64),
            )
            for part, source in sources.items()
        }


class Source:
    """A table file, or the rows of one split in it.

    Args:
        setting: the setting that names the file, for error messages.
        path: the file.
        frame: its rows, if already read; the index has the row numbers from 0 on.
    """

    def __init__(self, setting: str, path: Path, frame: DataFrame | None = None) -> None:
        self.setting = setting
        self.path = path
        self.frame = read_frame(setting, path) if frame is None else frame

    @property
    def columns(self) -> str:
        return f"the columns {join_names([*map(str, self.frame.columns)])}"

    def check_columns(self, setting: str, columns: Sequence[str]) -> None:
        if not columns:
            raise ValueError(f"{setting}=[]: name at least one column of {self.path}")
        if twice := [column for column in columns if list(columns).count(column) > 1]:
            raise ValueError(f"{setting}: {twice[0]} is named twice; name it once")
        if missing := [column for column in columns if column not in self.frame.columns]:
            raise ValueError(f"{setting}={missing[0]}: {self.path} has no such column; it has {self.columns}")

    def split_by_column(self, column: str) -> dict[Part, Source]:
        """Return the rows of each split that occurs in a column."""
        self.check_columns("split_column", [column])
        names = self.frame[column]
        for row, name in enumerate(names):
            if name not in get_args(Part):
                self.fail(row, column, "a split is train, val or test; fix it, or leave the row out")
        if not (names == "train").any():
            raise ValueError(f"split_column={column}: no row of {self.path} says train; mark the training rows")
        parts: tuple[Part, ...] = get_args(Part)
        return {
            part: Source(self.setting, self.path, self.frame[names == part]) for part in parts if (names == part).any()
        }

    def numbers(self, setting: str, columns: Sequence[str]) -> NDArray[np.float64]:
        """Return columns as finite numbers `(N, columns)`."""
        self.check_columns(setting, columns)
        found = [as_numbers(self.frame[column]) for column in columns]
        for column, values in zip(columns, found, strict=True):
            wrong = np.flatnonzero(~(np.abs(values) <= LARGEST))  # also True for NaN
            if len(wrong):
                row = int(wrong[0])
                if self.is_missing(row, column):
                    problem = "fill it in"
                else:
                    problem = "it is no number; fix it" if np.isnan(values[row]) else "it is too large; fix it"
                self.fail(row, column, f"{problem}, or leave the row out")
        return np.stack(found, axis=1)

    def labels(self, column: str) -> list[Any]:
        """Return a column of classes, which must be all integers, all text or all booleans."""
        self.check_columns("target", [column])
        labels = self.frame[column].tolist()
        for row in np.flatnonzero(self.frame[column].isna()):
            self.fail(row, column, "fill it in, or leave the row out")
        for row, label in enumerate(labels):
            if type(label) not in (int, str, bool) or type(label) is not type(labels[0]):
                self.fail(row, column, "classes are all integers, all text or all booleans; fix it")
        return labels

    def is_missing(self, row: int, column: str) -> bool:
        return bool(self.frame[column].isna().iloc[row])

    def fail(self, row: int, column: str, remedy: str) -> NoReturn:
        """Raise an error about one value."""
        value = "missing" if self.is_missing(row, column) else repr(self.frame[column].tolist()[row])
        raise ValueError(f"{self.path}, row {self.frame.index[row] + 1}: {column} is {value}; {remedy}")


def read_frame(setting: str, path: Path) -> DataFrame:
    """Read a file into a data frame with row numbers from 0 as index."""
    import pandas as pd

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{setting}={path}: a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file is needed; export one")
    if not path.is_file():
        raise ValueError(f"{setting}={path}: there is no such file")
    try:
        if suffix == ".csv":  # only empty fields are missing: NA may be a class
            frame = pd.read_csv(path, keep_default_na=False, na_values=[""], float_precision="round_trip")
        elif suffix == ".parquet":
            frame = pd.read_parquet(path).reset_index(drop=True)
        else:
            frame = read_npz(path)
    except ImportError as error:
        raise ValueError(f"{setting}={path}: reading it takes a package: pip install -e '.[data]'") from error
    except Exception as error:  # pandas and NumPy raise many kinds of exceptions
        raise ValueError(f"{setting}={path}: it cannot be read ({error}); is the file whole?") from error
    if frame.empty:
        raise ValueError(f"{setting}={path}: it has no rows; export it again, with its rows")
    return frame


def read_npz(path: Path) -> DataFrame:
    """Read the arrays x and y as the columns x0, x1, … and y, or y0, y1, …"""
    import pandas as pd

    with np.load(path, allow_pickle=False) as arrays:
        if missing := [name for name in ("x", "y") if name not in arrays]:
            raise ValueError(f"there is no array {missing[0]}, but {', '.join(arrays) or 'none'}")
        x, y = arrays["x"], arrays["y"]
    if x.ndim != 2 or y.ndim not in (1, 2) or len(x) != len(y):
        raise ValueError(f"x {x.shape} and y {y.shape} are not rows (N, F) with targets (N) or (N, K)")
    columns = {f"x{i}": x[:, i] for i in range(x.shape[1])}
    columns |= {"y": y} if y.ndim == 1 else {f"y{i}": y[:, i] for i in range(y.shape[1])}
    return pd.DataFrame(columns)


def as_numbers(column: Series) -> NDArray[np.float64]:
    """Return a column as numbers, with NaN for other values."""
    import pandas as pd
    from pandas.api.types import is_datetime64_any_dtype, is_timedelta64_dtype

    if is_datetime64_any_dtype(column) or is_timedelta64_dtype(column):
        return np.full(len(column), np.nan)
    return pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)


def holds_numbers(column: Series) -> bool:
    """Return whether more than half of a column's non-empty values are numbers; other values are then errors."""
    filled = column[column.notna()]
    return 2 * int(np.isfinite(as_numbers(filled)).sum()) > len(filled)
