"""Time series classification from .ts files of the UEA & UCR archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ablab.data.batch import Kind, Samples
from ablab.data.cache import content_key
from ablab.data.labelled import LabelledData, OfficialSplits

LARGEST = torch.finfo(torch.float32).max


class TimeSeries(LabelledData):
    """Time series of one or more dimensions; shorter series are padded, and `valid` marks the real steps.

    Each dimension is standardized separately, over the real steps of the training series.

    Args:
        train_file, test_file: files of the official splits, usually <name>_TRAIN.ts and <name>_TEST.ts.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, L, dimensions)`, targets `(N)`, valid `(N, L)`

    Raises:
        ValueError: a file is missing, both files are equal, or a line is not a series; the message names the line.

    References:
        Bagnall et al. 2018 (the archive and its format), https://arxiv.org/abs/1811.00075
    """

    kind: ClassVar[Kind] = "sequences"
    keep: ClassVar[tuple[int, ...]] = (2,)

    def __init__(self, *, train_file: str, test_file: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.train_file = Path(train_file)
        self.test_file = Path(test_file)

    def load(self) -> OfficialSplits:
        train, test = read_ts("train_file", self.train_file), read_ts("test_file", self.test_file)
        if content_key(self.train_file) == content_key(self.test_file):
            raise ValueError(
                f"test_file={self.test_file}: it has the same content as train_file={self.train_file}; give the test "
                "series, usually <name>_TEST.ts"
            )
        self.class_names = train.class_names or sorted({*train.labels, *test.labels})
        self.dimensions = train.series[0].shape[1]
        if test.series[0].shape[1] != self.dimensions:
            raise ValueError(
                f"test_file={self.test_file}: its series have {test.series[0].shape[1]} dimensions, and those of "
                f"{self.train_file} have {self.dimensions}"
            )
        self.longest = max(len(series) for series in (*train.series, *test.series))
        return OfficialSplits(self.pad(train), self.pad(test))

    def pad(self, file: TsFile) -> Samples:
        inputs = torch.zeros(len(file.series), self.longest, self.dimensions)
        valid = torch.zeros(len(file.series), self.longest, dtype=torch.bool)
        for i, series in enumerate(file.series):
            inputs[i, : len(series)], valid[i, : len(series)] = series, True
        numbers = {name: number for number, name in enumerate(self.class_names)}
        if strange := sorted(set(file.labels) - set(numbers)):
            raise ValueError(
                f"test_file={self.test_file}: its label {strange[0]!r} is none of {', '.join(self.class_names)}, which "
                f"{self.train_file} declares"
            )
        return Samples(inputs, torch.tensor([numbers[label] for label in file.labels]), valid)

    def caveats(self) -> list[str]:
        train, test = self.train_file.stem.lower(), self.test_file.stem.lower()
        is_swapped = train.endswith("test") and test.endswith("train")
        note = f"trained on {self.train_file.name} and tested on {self.test_file.name}: are they swapped?"
        return [*super().caveats(), *([note] if is_swapped else [])]

    @property
    def model_sizes(self) -> dict[str, int]:
        return {
            "in_features": self.dimensions,
            "context_length": self.longest,
            "num_classes": len(self.class_names),
        }


class TsFile(NamedTuple):
    """Content of a .ts file: series `(L, dimensions)`, their labels, and the declared class names."""

    series: list[Tensor]
    labels: list[str]
    class_names: list[str]


def read_ts(argument: str, path: Path) -> TsFile:
    """Read a .ts file with class labels.

    Args:
        argument: the argument that names the file, for error messages.
        path: the file.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise ValueError(f"{argument}={path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument}={path}: it cannot be read ({error})") from error
    series: list[Tensor] = []
    labels: list[str] = []
    class_names: list[str] = []
    in_data = False
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        place = f"{path}, line {number}"
        if in_data:
            one, label = read_series(place, line)
            if series and one.shape[1] != series[0].shape[1]:
                raise ValueError(
                    f"{place}: it has {one.shape[1]} dimensions, and the first series has {series[0].shape[1]}"
                )
            if class_names and label not in class_names:
                raise ValueError(f"{place}: its label {label!r} is none of {', '.join(class_names)}")
            series.append(one)
            labels.append(label)
            continue
        match [words[0].lower(), *(word.lower() for word in words[1:])]:
            case ["@data", *_]:
                in_data = True
            case ["@classlabel", "true", *_]:
                class_names = words[2:]
            case ["@classlabel", *_] | ["@targetlabel", "true", *_]:
                raise ValueError(f"{place}: its series have no class labels, and classification needs them")
            case ["@timestamps", "true", *_]:
                raise ValueError(f"{place}: series with time stamps are not supported; resample them to equal steps")
    if not series:
        raise ValueError(f"{argument}={path}: there is no series in it; is it a .ts file, and whole?")
    return TsFile(series, labels, class_names)


def read_series(place: str, line: str) -> tuple[Tensor, str]:
    """Parse a series `(L, dimensions)` and its label; colons separate dimensions and label, commas separate values."""
    *dimensions, label = line.strip().split(":")
    label = label.strip()
    if not dimensions or not label:
        raise ValueError(f"{place}: a series and a label are needed, with a colon between them; is the file whole?")
    if label.lower() in ("?", "nan"):
        raise ValueError(f"{place}: its label is missing ({label}); give one, or leave the series out")
    columns = [torch.tensor(list(read_values(place, text))) for text in dimensions]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"{place}: its dimensions have different lengths ({lengths})")
    return torch.stack(columns, dim=1), label


def read_values(place: str, text: str) -> Iterator[float]:
    for word in text.split(","):
        try:
            value = float(word)
        except ValueError as error:
            missing = "a value is missing (?)" if word.strip() == "?" else f"{word.strip()!r} is no number"
            raise ValueError(f"{place}: {missing}; fill it in, or leave the series out") from error
        if not abs(value) < LARGEST:
            what = "a value is missing (NaN)" if value != value else f"{word.strip()} is too large"
            raise ValueError(f"{place}: {what}; fix it, or leave the series out")
        yield value
