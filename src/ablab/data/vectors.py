"""Base class of tabular data sets: standardized feature vectors with class, label or numeric targets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablab.data.batch import Kind, Samples, Splits
from ablab.data.datamodule import DataModule
from ablab.data.labelled import (
    TEST_FRACTION,
    TEST_SEED,
    describe_contradictions,
    describe_overlaps,
    hold_out,
    join_names,
    random_fold,
    random_holdout,
    split_distinct,
    split_fold,
)

TargetKind = Literal["class", "multilabel", "number"]
Part = Literal["train", "val", "test"]


class Rows(NamedTuple):
    """Rows of a table before standardization.

    Shape:
        features `(N, F)`; targets `(N)` with class indices, or `(N, K)` with labels 0 and 1, or numbers
    """

    features: NDArray[np.float64]
    targets: NDArray[Any]


class Vectors(DataModule):
    """Base class of tabular data sets, standardized by mean and standard deviation of the training rows.

    Numeric targets are standardized, too; `Regression` reports metrics in the original unit. A subclass's `load`
    returns the rows and sets `target_kind`, `feature_names` and `target_names`.

    Args:
        val_fraction: fraction of the training rows held out for validation.
        settings: see `DataModule`.

    Shape:
        inputs `(N, F)`; targets `(N)` with class indices, or `(N, K)` with labels (0.0 or 1.0) or numbers

    Raises:
        ValueError: a split has no rows, a feature or target is constant, or a `DataModule` setting is invalid.
    """

    kind: ClassVar[Kind] = "vectors"
    target_kind: TargetKind
    feature_names: list[str]
    target_names: list[str]  # names of the classes, or of the target columns

    def __init__(self, *, val_fraction: float = 0.2, **settings: Any) -> None:
        super().__init__(val_fraction=val_fraction, **settings)
        self.remarks: tuple[str, ...] = ()  # remarks on the splits, for the description of the data

    @abstractmethod
    def load(self) -> Mapping[Part, Rows]:
        """Read the training rows, and the validation and test rows if the table has such splits."""

    def read(self) -> Splits:
        parts = self.load()
        for name, rows in parts.items():
            if not len(rows.targets):
                raise ValueError(f"the {name} part has no rows; give some, or leave the part out")
        if self.target_kind == "class" and len(self.target_names) < 2:
            raise ValueError(f"the data have one class, {self.target_names[0]}; at least two are needed to tell apart")
        features = np.concatenate([rows.features for rows in parts.values()])
        targets = np.concatenate([rows.targets for rows in parts.values()])
        raw = Samples(torch.from_numpy(features), torch.from_numpy(targets))
        ends = np.cumsum([len(rows.targets) for rows in parts.values()]).tolist()
        given = {
            name: raw.part(torch.arange(end - len(parts[name].targets), end))
            for name, end in zip(parts, ends, strict=True)
        }
        train, val, test = self.split_rows(given)
        if self.target_kind == "class":
            self.check_classes(train)
        self.remarks += tuple(describe_overlaps(train, val, test))
        if self.target_kind == "class":
            self.remarks += tuple(describe_contradictions(train, val, test))
        scaled = Samples(
            self.standardized_features(raw, train),
            self.standardized_targets(raw, train),
            content=raw.digest_of_tensors(),  # hash of the raw values, before rounding
            digests=raw.digests,
        )
        return Splits(*(scaled.part(members_of(part)) for part in (train, val, test)))

    def split_rows(self, given: Mapping[Part, Samples]) -> tuple[Samples, Samples, Samples]:
        """Return training, validation and test rows; missing splits are held out of the training rows."""
        train = given["train"]
        if "test" in given:
            test = given["test"]
        else:  # fixed, so that all runs are tested on the same rows
            kept, held_out = self.split_holdout(train, TEST_FRACTION, TEST_SEED, "the test part's fraction")
            train, test = train.part(kept), train.part(held_out)
        if "val" in given and self.folds is None:
            self.remarks += ("validated on the given validation part, val_fraction is not used",)
            return train, given["val"], test
        if "val" in given:
            self.remarks += (f"the {len(given['val']):,} rows of the given validation part are not used",)
        if self.folds is not None:
            kept, held_out = self.split_fold(train)
        elif self.val_fraction == 0:
            return train, train.part(torch.arange(0)), test
        else:
            kept, held_out = self.split_holdout(train, self.val_fraction, self.split_seed, "val_fraction")
        return train.part(kept), train.part(held_out), test

    def split_holdout(self, rows: Samples, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
        """Return the indices of remaining and held-out rows, stratified by class, with duplicates on the same side."""
        if self.target_kind == "class":
            return hold_out(rows, fraction, seed, name)
        return split_distinct(rows, lambda different: random_holdout(len(different), fraction, seed, name))

    def split_fold(self, rows: Samples) -> tuple[Tensor, Tensor]:
        """Return the indices of the rows outside and inside the fold."""
        assert self.folds is not None
        folds, fold, seed = self.folds, self.fold, self.split_seed
        if self.target_kind == "class":
            return split_fold(rows, folds, fold, seed)
        return split_distinct(rows, lambda different: random_fold(len(different), folds, fold, seed))

    def class_counts(self, rows: Samples) -> list[int]:
        """Return the number of rows per class."""
        return rows.targets.bincount(minlength=len(self.target_names)).tolist()

    def training_class_counts(self) -> list[int] | None:
        assert self.splits is not None
        train = self.splits.train
        return self.class_counts(train) if self.target_kind == "class" and isinstance(train, Samples) else None

    def check_classes(self, train: Samples) -> None:
        counts = self.class_counts(train)
        if missing := [name for name, count in zip(self.target_names, counts, strict=True) if not count]:
            raise ValueError(f"no training row has the class {join_names(missing)}; give some, or leave the class out")

    def standardized_features(self, raw: Samples, train: Samples) -> Tensor:
        features = raw.tensors.inputs
        seen = features[members_of(train)].numpy()
        if constant := [name for name, column in zip(self.feature_names, seen.T, strict=True) if is_constant(column)]:
            raise ValueError(
                f"the feature {join_names(constant)} has the same value in all {len(seen):,} training rows; leave it "
                "out of the file, or of data.features"
            )
        self.feature_mean, self.feature_std = torch.from_numpy(seen.mean(0)), torch.from_numpy(seen.std(0))
        return self.standardize(features)

    def standardize(self, features: Tensor) -> Tensor:
        """Standardize features `(N, F)` by mean and std of the training rows; returns float32."""
        return finite_float32((features - self.feature_mean) / self.feature_std)

    def standardized_targets(self, raw: Samples, train: Samples) -> Tensor:
        targets = raw.tensors.targets
        if self.target_kind == "class":
            return targets
        if self.target_kind == "multilabel":
            return targets.float()
        seen = targets[members_of(train)].numpy()
        if constant := [name for name, column in zip(self.target_names, seen.T, strict=True) if is_constant(column)]:
            raise ValueError(
                f"the target {join_names(constant)} has the same value in all {len(seen):,} training rows, so that "
                "there is nothing to learn; choose another"
            )
        self.target_mean, self.target_std = seen.mean(0).tolist(), seen.std(0).tolist()
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.target_mean, self.target_std))
        return finite_float32((targets - mean) / std)

    def names(self) -> list[str]:
        return self.target_names

    def caveats(self) -> list[str]:
        return [*super().caveats(), *self.remarks]

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_features": len(self.feature_names), "num_outputs": len(self.target_names)}

    @property
    def task_sizes(self) -> dict[str, Any]:
        if self.target_kind == "class":
            return {"class_names": self.target_names}
        if self.target_kind == "multilabel":
            return {"label_names": self.target_names}
        return {
            "target_names": self.target_names,
            "target_mean": self.target_mean,
            "target_std": self.target_std,
        }


def members_of(part: Samples) -> Tensor:
    """Return the indices of a split's rows among all rows."""
    assert part.members is not None
    return part.members


def is_constant(column: NDArray[np.float64]) -> bool:
    """Return whether a column's standard deviation is 0, at least numerically."""
    return bool(np.ptp(column) == 0 or column.std() == 0)


def finite_float32(values: Tensor) -> Tensor:
    """Convert to float32; clip values that would overflow to infinity."""
    largest = torch.finfo(torch.float32).max
    return values.clamp(-largest, largest).float()
