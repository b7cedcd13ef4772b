"""What data with class labels share: stratified parts, standardization, augmentation and shift."""

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
from ablab.data.draws import in_view
from ablab.data.order import BatchOrder, FewClasses
from ablab.data.shifts import Shift
from ablab.data.stream import ImageStream, StreamLoader

# What data sets without an official test part hold out: the same samples for every run and every user.
TEST_FRACTION = 0.2
TEST_SEED = 20100324


@dataclass(frozen=True)
class Official:
    """The parts of a data set as its authors made them; a validation part that is missing is held out of training."""

    train: Samples | ImageStream
    test: Samples
    val: Samples | None = None


class LabelledData(DataModule):
    """Samples with class labels: inputs leave the device as (x − mean) / std of the training split.

    A subclass's `load` gives the official parts and sets `class_names`.

    Args:
        augment: what is done to training samples, batch by batch on the device; None is nothing.
        shift: what is done to the test inputs, their labels unchanged; None is nothing.
        classes_per_batch: fill each training batch from so few classes; None takes samples as they come.
        settings: see `DataModule`.

    Raises:
        ValueError: labels that no class has, a class without samples, or what `DataModule` refuses.
    """

    class_names: list[str]
    keep: ClassVar[tuple[int, ...]] = ()  # the dimensions whose entries are standardized each on its own
    value_range: ClassVar[tuple[float, float]] = (0.0, 255.0)  # of the inputs, for shifts and augmentation

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
        self.remarks: tuple[str, ...] = ()  # on the parts, for the line that describes them
        if shift is not None and not self.can_shift(shift):
            raise ValueError(
                f"shift: {type(shift).__name__} is for {' and '.join(shift.kinds)}, and {type(self).__name__} gives "
                f"{self.kind}; choose another, or data/shift=none"
            )

    def can_shift(self, shift: Shift) -> bool:
        """Return whether a shift is for data of this kind and leaves their labels true."""
        return self.kind in shift.kinds

    @abstractmethod
    def load(self) -> Official:
        """Read the official parts and set `class_names`."""

    def read(self) -> Splits:
        official = self.load()
        if len(self.class_names) < 2:
            raise ValueError(f"the data have one class, {self.class_names[0]}; at least two are needed to tell apart")
        for name, samples in vars(official).items():
            if isinstance(samples, Samples):
                self.check_labels(name, samples)
        train, val = self.training_and_validation(official)
        if official.val is not None and self.folds is None:
            self.remarks += ("validated on the given validation part, val_fraction is not used",)
        elif official.val is not None:
            self.remarks += (f"the {len(official.val):,} samples of the given validation part are not used",)
        self.remarks += tuple(self.remarks_on(train, val, official.test))
        self.mean, self.std = moments(train if isinstance(train, Samples) else train.head, self.keep)
        return Splits(train=train, val=val, test=official.test)

    def training_and_validation(self, official: Official) -> tuple[Samples | ImageStream, Samples]:
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
            kept, held_out = self.held_out(train, self.val_fraction, self.split_seed, "val_fraction")
        else:
            kept, held_out = self.one_fold(train)
        return train.part(kept), train.part(held_out)

    def held_out(self, samples: Samples, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
        """Return the samples that stay and those held out; copies of a sample on one side."""
        return hold_out(samples, fraction, seed, name)

    def one_fold(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return the samples outside and inside the fold."""
        assert self.folds is not None
        return one_fold(samples, self.folds, self.fold, self.split_seed)

    def check_labels(self, part: str, samples: Samples) -> None:
        """Refuse labels that no class has, and a class without training samples."""
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
        """Count the targets of each class `(num_classes)`."""
        return samples.targets.bincount(minlength=len(self.class_names))

    def training_class_counts(self) -> list[int] | None:
        assert self.splits is not None
        train = self.splits.train
        return self.class_counts(train).tolist() if isinstance(train, Samples) else None

    def missing_classes(self, samples: Samples) -> str:
        """Return the names of the classes that no target has."""
        counts = self.class_counts(samples).tolist()
        return enumerated([name for name, count in zip(self.class_names, counts, strict=True) if not count])

    def remarks_on(self, train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
        """Yield what a reader should know of the parts before trusting a number."""
        yield from self.without_samples(val, test)
        yield from overlaps(train, val, test)
        yield from contradictions(train, val, test)

    def without_samples(self, val: Samples, test: Samples) -> Iterator[str]:
        """Name the classes that the validation and the test part lack."""
        for name, part in (("validation", val), ("test", test)):
            if len(part) and (missing := self.missing_classes(part)):
                yield f"no {name} sample has the class {missing}"

    @property
    def augmented(self) -> bool:
        return self.augment is not None and self.augment.on

    def changed(self, splits: Splits) -> Splits:
        if self.shift is None:
            return splits
        assert isinstance(splits.test, Samples)
        inputs, targets, valid, *_ = splits.test.whole()
        low, high = self.value_range
        return replace(splits, test=Samples(self.shift(inputs, valid, low=low, high=high), targets, valid))

    def train_dataloader(self) -> Any:
        assert self.splits is not None, "call setup first"
        stream = self.splits.train
        if not isinstance(stream, ImageStream):
            return super().train_dataloader()
        rank, world_size = self.place
        return StreamLoader(
            stream,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            num_threads=max(1, self.num_workers),
            position=self.position,
        )

    def training_order(self, split: Split, rank: int, world_size: int) -> BatchOrder:
        if self.classes_per_batch is None:
            return super().training_order(split, rank, world_size)
        assert isinstance(split, Samples)
        return FewClasses(
            split.targets.cpu(),
            classes_per_batch=self.classes_per_batch,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def names(self) -> list[str]:
        return self.class_names

    def unusual(self) -> list[str]:
        found = super().unusual()
        if self.classes_per_batch is not None:
            found.append(f"trained on batches of {self.classes_per_batch} classes")
        if self.shift is not None:
            found.append(f"tested under {type(self.shift).__name__}, severity {self.shift.severity}")
        return [*found, *self.remarks]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if batch.seeds is None or self.augment is None:
            return self.standardized(batch)
        if not self.num_views:
            return self.augmented_once(batch, self.augment)
        own, epoch = batch.seeds.unbind(1)
        seeds = [torch.stack([in_view(own, view), epoch], 1) for view in range(self.num_views)]
        views = [self.augmented_once(batch._replace(seeds=of_view), self.augment).inputs for of_view in seeds]
        return self.standardized(batch)._replace(views=torch.stack(views, 1))

    def augmented_once(self, batch: Batch, augment: Augment) -> Batch:
        batch = self.standardized(augment.before(batch, self.value_range))
        return augment.after(batch, len(self.class_names))

    def standardized(self, batch: Batch) -> Batch:
        inputs = batch.inputs.to(torch.float32, copy=True)  # a copy, to be worked on in place
        if self.mean.device != inputs.device:  # once: a copy in each step would wait for the device
            self.mean, self.std = self.mean.to(inputs.device), self.std.to(inputs.device)
        inputs.sub_(self.mean).div_(self.std)
        if batch.valid is not None:
            inputs *= batch.valid[..., None]
        return batch._replace(inputs=inputs)

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"class_names": self.class_names}


def enumerated(names: Sequence[str]) -> str:
    """Return names for a message, at most six of them."""
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"{len(names) - 5} more"])


def moments(samples: Samples, keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all dimensions but those in `keep`, in float64 and in small pieces."""
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
    var = (squares / count - mean * mean).clamp(min=0)  # float64 leaves a dozen digits to the difference
    std = var.sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()  # what is constant is only centered


def overlaps(train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
    """Count samples that two parts share, by their inputs; a training part that is a stream is left out."""
    parts = {"training": train, "validation": val, "test": test}
    digests = {name: part.digests for name, part in parts.items() if isinstance(part, Samples)}
    for name, other in (("test", "training"), ("test", "validation"), ("validation", "training")):
        if other in digests and (number := int(torch.isin(digests[name], digests[other]).sum())):
            yield f"{number:,} of {len(digests[name]):,} {name} samples are {other} samples too"


def contradictions(train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
    """Count samples whose labels contradict each other, by their inputs; a stream is left out."""
    parts = [part for part in (train, val, test) if isinstance(part, Samples)]
    targets = torch.cat([part.targets for part in parts])
    distinct, content = torch.cat([part.digests for part in parts]).unique(return_inverse=True)
    lowest, highest = (
        distinct.scatter_reduce(0, content, targets, way, include_self=False) for way in ("amin", "amax")
    )
    if number := int((lowest != highest)[content].sum()):
        yield f"{number:,} samples have the inputs of another one and a different label"


def hold_out(samples: Samples, fraction: float, seed: int, name: str = "val_fraction") -> tuple[Tensor, Tensor]:
    """The numbers of the samples that stay and of those held out, the classes in equal shares in both.

    Samples of the same content stay together, so that none is in both parts.

    Args:
        fraction: to be held out.
        name: the setting that says so, for errors.
    """
    return with_copies(samples, lambda rows: stratified_holdout(samples.targets[rows], fraction, seed, name)[1])


def one_fold(samples: Samples, folds: int, fold: int, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the samples outside and inside a fold; samples of the same content stay together."""
    return with_copies(samples, lambda rows: stratified_fold(samples.targets[rows], folds, fold, seed))


def with_copies(samples: Samples, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Choose among the different samples, by the number of each among all samples; their copies go with them."""
    first, group = copies(samples.digests)
    chosen = torch.zeros(len(first), dtype=torch.bool)
    chosen[choose(first)] = True
    chosen = chosen[group]
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def copies(digests: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first sample of each distinct content, and for each sample the number of its content."""
    distinct, group = digests.unique(return_inverse=True)
    rows = torch.arange(len(digests))
    first = torch.full_like(distinct, len(digests)).scatter_reduce(0, group, rows, "amin")
    order = first.argsort()  # contents are numbered by their first sample, whatever their digests are
    return first[order], order.argsort()[group]


def stratified_holdout(
    targets: Tensor, fraction: float, seed: int, name: str = "val_fraction"
) -> tuple[Tensor, Tensor]:
    """Split indices in two, the classes in equal shares in both.

    Returns:
        The indices that stay, and those held out: `fraction` of all, at least one of each class.
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
    # as scikit-learn's train_test_split draws, which takes longer to import than a short run trains
    rng = np.random.RandomState(seed)
    counts, num_held_out = targets.bincount().numpy(), math.ceil(fraction * len(targets))
    counts = counts[counts > 0]
    num_kept = shares(counts, len(targets) - num_held_out, rng)
    shares(counts - num_kept, num_held_out, rng)  # draws, too
    of_class = np.split(np.argsort(targets.numpy(), kind="stable"), np.cumsum(counts)[:-1])
    parts = [np.split(rng.permutation(members), [number]) for members, number in zip(of_class, num_kept, strict=True)]
    kept, held_out = (torch.as_tensor(np.sort(np.concatenate(side))) for side in zip(*parts, strict=True))
    if any(len(targets[part].unique()) < classes for part in (kept, held_out)):
        raise refuse()  # a rare class fell to one side whole
    return kept, held_out


def shares(counts: NDArray[Any], number: int, rng: RandomState) -> NDArray[Any]:
    """Divide a number of draws among classes in proportion to their sizes.

    What the rounding leaves goes to the largest remainders, drawn at random where these are equal.

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
    """The indices of one of the disjoint folds that cover everything, the classes in equal shares in each."""
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
    """Draw the samples to hold out, `fraction` of all, where there is no class to stratify by."""
    num_held_out = math.ceil(fraction * number)
    if not 0 < fraction < 1 or num_held_out >= number:
        raise ValueError(
            f"{name}={fraction}: both parts of {number} different samples need at least one; choose a fraction above 0 "
            "and below 1, or give more samples"
        )
    return torch.from_numpy(np.random.RandomState(seed).permutation(number)[:num_held_out])


def random_fold(number: int, folds: int, fold: int, seed: int) -> Tensor:
    """Draw one of the disjoint folds that cover all samples."""
    if number < folds:
        raise ValueError(f"folds={folds}: there are only {number} different training samples; choose fewer folds")
    return torch.from_numpy(np.array_split(np.random.RandomState(seed).permutation(number), folds)[fold])
