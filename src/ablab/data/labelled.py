"""Base class of data sets with class labels: stratified splits, standardization, augmentation and shift."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor

from ablab.data.augment import Augment
from ablab.data.batch import Batch, Samples, Split, Splits
from ablab.data.datamodule import DataModule
from ablab.data.rng import view_seeds
from ablab.data.sampler import BatchSampler, FewClassesSampler
from ablab.data.shifts import Shift
from ablab.data.stream import ImageStream, StreamLoader

# Test split of data sets without an official one; fixed, so that all runs are tested on the same samples.
TEST_FRACTION = 0.2
TEST_SEED = 20100324


@dataclass(frozen=True)
class OfficialSplits:
    """The official splits of a data set; a missing validation split is held out of the training split."""

    train: Samples | ImageStream
    test: Samples
    val: Samples | None = None


class LabelledData(DataModule):
    """Base class of data sets with class labels, whose inputs are standardized by the training split's mean and std.

    A subclass's `load` returns the official splits and sets `class_names`.

    Args:
        augment: augmentation of training batches on the device; None for none.
        shift: distribution shift of the test inputs, which keeps the labels; None for none.
        classes_per_batch: number of classes in each training batch, for batches that are not i.i.d.; None for
            ordinary batches.
        settings: see `DataModule`.

    Raises:
        ValueError: a label is out of range, a class has no training samples, or a `DataModule` setting is invalid.
    """

    class_names: list[str]
    keep: ClassVar[tuple[int, ...]] = ()  # dimensions with separate means and standard deviations
    value_range: ClassVar[tuple[float, float]] = (0.0, 255.0)  # range of the inputs, for shifts and augmentation

    def __init__(
        self,
        *,
        augment: Augment | None = None,
        shift: Shift | None = None,
        classes_per_batch: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.augment = augment
        self.shift = shift
        self.classes_per_batch = classes_per_batch
        self.remarks: tuple[str, ...] = ()  # remarks on the splits, for the description of the data
        if shift is not None and not self.can_shift(shift):
            raise ValueError(
                f"shift: {type(shift).__name__} is for {' and '.join(shift.kinds)}, and {type(self).__name__} gives "
                f"{self.kind}; choose another, or data/shift=none"
            )

    def can_shift(self, shift: Shift) -> bool:
        """Return whether a shift supports this kind of data and preserves the labels."""
        return self.kind in shift.kinds

    @abstractmethod
    def load(self) -> OfficialSplits:
        """Read the official splits and set `class_names`."""

    def read(self) -> Splits:
        official = self.load()
        if len(self.class_names) < 2:
            raise ValueError(f"the data have one class, {self.class_names[0]}; at least two are needed to tell apart")
        for name, samples in vars(official).items():
            if isinstance(samples, Samples):
                self.check_labels(name, samples)
        train, val = self.split_training(official)
        if official.val is not None and self.folds is None:
            self.remarks += ("validated on the given validation part, val_fraction is not used",)
        elif official.val is not None:
            self.remarks += (f"the {len(official.val):,} samples of the given validation part are not used",)
        self.remarks += tuple(self.describe_splits(train, val, official.test))
        self.mean, self.std = mean_and_std(train if isinstance(train, Samples) else train.head, self.keep)
        return Splits(train=train, val=val, test=official.test)

    def split_training(self, official: OfficialSplits) -> tuple[Samples | ImageStream, Samples]:
        train, val = official.train, official.val
        if isinstance(train, ImageStream):
            if val is None or self.folds is not None or self.classes_per_batch is not None:
                raise ValueError(
                    "streaming=true: a stream can neither be split nor picked from; name the validation part with "
                    "data.val_split, and leave data.folds and data.classes_per_batch at null"
                )
            return train, val
        if val is not None and self.folds is None:
            return train, val
        if self.val_fraction == 0 and self.folds is None:
            return train, train.part(torch.arange(0))
        if self.folds is None:
            kept, held_out = self.split_holdout(train, self.val_fraction, self.split_seed, "val_fraction")
        else:
            kept, held_out = self.split_fold(train)
        return train.part(kept), train.part(held_out)

    def split_holdout(self, samples: Samples, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
        """Return the indices of remaining and held-out samples, with duplicates on the same side."""
        return hold_out(samples, fraction, seed, name)

    def split_fold(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the indices of the samples outside and inside the fold."""
        assert self.folds is not None
        return split_fold(samples, self.folds, self.fold, self.split_seed)

    def check_labels(self, part: str, samples: Samples) -> None:
        """Check that all labels are class indices, and that each class has training samples."""
        targets = samples.targets
        wrong = ((targets < 0) | (targets >= len(self.class_names))).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"the {part} part has labels that are not from 0 to {len(self.class_names) - 1}: {int(targets[row])} "
                f"at row {row}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "") + "; fix or leave out"
            )
        if part == "train" and (missing := self.missing_classes(samples)):
            raise ValueError(f"no training sample has the class {missing}; give some, or leave the class out")

    def class_counts(self, samples: Samples) -> Tensor:
        """Return the number of targets per class `(num_classes)`."""
        return samples.targets.bincount(minlength=len(self.class_names))

    def training_class_counts(self) -> list[int] | None:
        assert self.splits is not None
        train = self.splits.train
        return self.class_counts(train).tolist() if isinstance(train, Samples) else None

    def missing_classes(self, samples: Samples) -> str:
        """Return the names of the classes without targets, joined for messages."""
        counts = self.class_counts(samples).tolist()
        return join_names([name for name, count in zip(self.class_names, counts, strict=True) if not count])

    def describe_splits(self, train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
        """Yield remarks on the splits that affect how results are to be read."""
        yield from self.describe_missing_classes(val, test)
        yield from describe_overlaps(train, val, test)
        yield from describe_contradictions(train, val, test)

    def describe_missing_classes(self, val: Samples, test: Samples) -> Iterator[str]:
        """Yield remarks on classes without validation or test samples."""
        for name, part in (("validation", val), ("test", test)):
            if len(part) and (missing := self.missing_classes(part)):
                yield f"no {name} sample has the class {missing}"

    @property
    def augmented(self) -> bool:
        return self.augment is not None and self.augment.is_enabled

    def apply_shift(self, splits: Splits) -> Splits:
        if self.shift is None:
            return splits
        assert isinstance(splits.test, Samples)
        inputs, targets, valid, *_ = splits.test.as_batch()
        low, high = self.value_range
        return replace(splits, test=Samples(self.shift(inputs, valid, low=low, high=high), targets, valid))

    def train_dataloader(self) -> Any:
        assert self.splits is not None, "call setup first"
        stream = self.splits.train
        if not isinstance(stream, ImageStream):
            return super().train_dataloader()
        rank, world_size = self.rank_and_world_size
        return StreamLoader(
            stream,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            num_threads=max(1, self.num_workers),
            position=self.position,
        )

    def training_sampler(self, split: Split, rank: int, world_size: int) -> BatchSampler:
        if self.classes_per_batch is None:
            return super().training_sampler(split, rank, world_size)
        assert isinstance(split, Samples)
        return FewClassesSampler(
            split.targets.cpu(),
            classes_per_batch=self.classes_per_batch,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def names(self) -> list[str]:
        return self.class_names

    def caveats(self) -> list[str]:
        found = super().caveats()
        if self.classes_per_batch is not None:
            found.append(f"trained on batches of {self.classes_per_batch} classes")
        if self.shift is not None:
            found.append(f"tested under {type(self.shift).__name__}, severity {self.shift.severity}")
        return [*found, *self.remarks]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if batch.seeds is None or self.augment is None:
            return self.standardize(batch)
        if not self.num_views:
            return self.augment_batch(batch, self.augment)
        own, epoch = batch.seeds.unbind(1)
        seeds = [torch.stack([view_seeds(own, view), epoch], 1) for view in range(self.num_views)]
        views = [self.augment_batch(batch._replace(seeds=of_view), self.augment).inputs for of_view in seeds]
        return self.standardize(batch)._replace(views=torch.stack(views, 1))

    def augment_batch(self, batch: Batch, augment: Augment) -> Batch:
        batch = self.standardize(augment.augment_raw(batch, self.value_range))
        return augment.augment_standardized(batch, len(self.class_names))

    def standardize(self, batch: Batch) -> Batch:
        inputs = batch.inputs.to(torch.float32, copy=True)  # a copy, modified in place below
        if self.mean.device != inputs.device:  # once: a copy in every step would synchronize with the GPU
            self.mean, self.std = self.mean.to(inputs.device), self.std.to(inputs.device)
        inputs.sub_(self.mean).div_(self.std)
        if batch.valid is not None:
            inputs *= batch.valid[..., None]
        return batch._replace(inputs=inputs)

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"class_names": self.class_names}


def join_names(names: Sequence[str]) -> str:
    """Join at most six names, for messages."""
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"])


def mean_and_std(samples: Samples, keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over all dimensions but `keep`, computed in float64 and in chunks."""
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for start in range(0, len(samples), 4096):
        batch = samples[range(start, min(start + 4096, len(samples)))]
        inputs = batch.inputs.double()
        dims = [dim for dim in range(inputs.dim()) if dim not in keep]
        total = total + inputs.sum(dims, keepdim=True)
        squares = squares + (inputs * inputs).sum(dims, keepdim=True)
        real = inputs.numel() if batch.valid is None else int(batch.valid.sum()) * inputs[0, 0].numel()
        count += real // total.numel()
    mean = total / count
    var = (squares / count - mean * mean).clamp(min=0)  # float64 keeps enough digits despite cancellation
    std = var.sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()  # constant features are only centered


def describe_overlaps(train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
    """Yield remarks on samples with equal inputs in two splits; streams are not checked."""
    parts = {"training": train, "validation": val, "test": test}
    digests = {name: part.digests for name, part in parts.items() if isinstance(part, Samples)}
    for name, other in (("test", "training"), ("test", "validation"), ("validation", "training")):
        if other in digests and (number := int(torch.isin(digests[name], digests[other]).sum())):
            yield f"{number:,} of {len(digests[name]):,} {name} samples are {other} samples too"


def describe_contradictions(train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
    """Yield a remark on samples with equal inputs but different labels; streams are not checked."""
    parts = [part for part in (train, val, test) if isinstance(part, Samples)]
    targets = torch.cat([part.targets for part in parts])
    distinct, content = torch.cat([part.digests for part in parts]).unique(return_inverse=True)
    lowest, highest = (
        distinct.scatter_reduce(0, content, targets, way, include_self=False) for way in ("amin", "amax")
    )
    if number := int((lowest != highest)[content].sum()):
        yield f"{number:,} samples have the inputs of another one and a different label"


def hold_out(samples: Samples, fraction: float, seed: int, name: str = "val_fraction") -> tuple[Tensor, Tensor]:
    """Return the indices of remaining and held-out samples, stratified by class.

    Samples with equal inputs are kept on the same side.

    Args:
        samples: the samples to split.
        fraction: fraction to hold out.
        seed: seed of the choice.
        name: the setting of the fraction, for error messages.
    """
    return split_distinct(samples, lambda rows: stratified_holdout(samples.targets[rows], fraction, seed, name)[1])


def split_fold(samples: Samples, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the samples outside and inside a fold, with duplicates on the same side."""
    return split_distinct(samples, lambda rows: stratified_fold(samples.targets[rows], folds, fold, seed))


def split_distinct(samples: Samples, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Split samples in two, by a function that chooses among the distinct ones; duplicates follow."""
    first, group = group_duplicates(samples.digests)
    chosen = torch.zeros(len(first), dtype=torch.bool)
    chosen[choose(first)] = True
    chosen = chosen[group]
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def group_duplicates(digests: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first sample of each group of duplicates, and each sample's group."""
    distinct, group = digests.unique(return_inverse=True)
    rows = torch.arange(len(digests))
    first = torch.full_like(distinct, len(digests)).scatter_reduce(0, group, rows, "amin")
    order = first.argsort()  # number groups by their first sample, independently of the hash values
    return first[order], order.argsort()[group]


def stratified_holdout(
    targets: Tensor, fraction: float, seed: int, name: str = "val_fraction"
) -> tuple[Tensor, Tensor]:
    """Split sample indices in two, stratified by class.

    Returns:
        The remaining indices, and the held-out ones: `fraction` of all, at least one of each class.
    """

    def refuse() -> ValueError:
        least = max(classes / len(targets), 1 / max(1, fewest))
        remedy = f"choose a fraction from {least:.2g} to {1 - least:.2g}" if least < 0.5 else "give more samples"
        return ValueError(
            f"{name}={fraction}: both parts of {len(targets)} different samples need each of the {classes} classes; "
            f"{remedy}"
        )

    classes, fewest = len(targets.unique()), int(targets.bincount().min())
    if not (0 < fraction < 1 and classes <= fraction * len(targets) <= len(targets) - classes) or fewest < 2:
        raise refuse()
    # gives the same split as scikit-learn's train_test_split, whose import takes longer than a short run
    rng = np.random.RandomState(seed)
    counts, num_held_out = targets.bincount().numpy(), math.ceil(fraction * len(targets))
    counts = counts[counts > 0]
    num_kept = allocate(counts, len(targets) - num_held_out, rng)
    allocate(counts - num_kept, num_held_out, rng)  # only to consume random numbers as scikit-learn does
    of_class = np.split(np.argsort(targets.numpy(), kind="stable"), np.cumsum(counts)[:-1])
    parts = [np.split(rng.permutation(members), [number]) for members, number in zip(of_class, num_kept, strict=True)]
    kept, held_out = (torch.as_tensor(np.sort(np.concatenate(side))) for side in zip(*parts, strict=True))
    if any(len(targets[part].unique()) < classes for part in (kept, held_out)):
        raise refuse()  # a rare class ended up on one side entirely
    return kept, held_out


def allocate(counts: NDArray[Any], number: int, rng: RandomState) -> NDArray[Any]:
    """Distribute a number of samples over classes in proportion to the class sizes.

    The rest after rounding down goes to the classes with the largest remainders, with random tie-breaking.

    Shape:
        counts `(num_classes)` -> `(num_classes)`
    """
    exact = counts / counts.sum() * number
    found = np.floor(exact)
    remainders, missing = exact - found, int(number - found.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        tied = np.flatnonzero(remainders == remainder)
        drawn = rng.choice(tied, size=min(len(tied), missing), replace=False)
        found[drawn] += 1
        missing -= len(drawn)
    return found.astype(int)


def stratified_fold(targets: Tensor, folds: int, fold: int, seed: int) -> Tensor:
    """Return the indices of one cross-validation fold, stratified by class."""
    from sklearn.model_selection import StratifiedKFold

    counts = targets.bincount()
    if int(counts.min()) < folds:
        raise ValueError(
            f"folds={folds}: class {int(counts.argmin())} has only {int(counts.min())} different training samples; "
            "choose fewer folds"
        )
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(targets)), targets.numpy())
    return torch.as_tensor([held_out for _, held_out in parts][fold])


def random_holdout(number: int, fraction: float, seed: int, name: str) -> Tensor:
    """Return random indices to hold out, `fraction` of all, without stratification."""
    num_held_out = math.ceil(fraction * number)
    if not 0 < fraction < 1 or num_held_out >= number:
        raise ValueError(
            f"{name}={fraction}: both parts of {number} different samples need at least one; choose a fraction above 0 "
            "and below 1, or give more samples"
        )
    return torch.from_numpy(np.random.RandomState(seed).permutation(number)[:num_held_out])


def random_fold(number: int, folds: int, fold: int, seed: int) -> Tensor:
    """Return the indices of one random cross-validation fold."""
    if number < folds:
        raise ValueError(f"folds={folds}: there are only {number} different training samples; choose fewer folds")
    return torch.from_numpy(np.array_split(np.random.RandomState(seed).permutation(number), folds)[fold])
