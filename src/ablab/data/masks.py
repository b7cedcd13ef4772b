"""Base class of segmentation data sets: images with masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ablab.data.augment import Augment
from ablab.data.batch import IGNORED_PIXEL, Batch, Kind, Samples
from ablab.data.labelled import LabelledData, describe_overlaps, random_fold, random_holdout, split_distinct
from ablab.data.shifts import Shift
from ablab.data.stream import ImageStream

CHUNK = 256  # masks per chunk, since memory-mapped masks may not fit into memory


class Masks(LabelledData):
    """Base class of images with masks, which have a class index, or 255 for ignored, at each pixel.

    Validation splits and folds are not stratified, since an image has several classes. A subclass's `load` returns the
    official splits, with uint8 masks `(N, H, W)` as targets, and sets `class_names`.

    Args:
        augment: augmentation of training images; crop and flip also transform the masks.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, C, H, W)`, targets `(N, H, W)`

    Raises:
        ValueError: a mask has an unknown class index, augmentation mixes images, or a setting is invalid.
    """

    kind: ClassVar[Kind] = "masks"
    keep: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, *, augment: Augment | None = None, **settings: Any) -> None:
        super().__init__(augment=augment, **settings)
        for name in ("mixup", "cutmix"):
            if augment is not None and (value := getattr(augment, name)):
                raise ValueError(
                    f"augment.{name}={value}: it mixes two images that have one label each, and {type(self).__name__} "
                    "gives a label for each pixel; set it to 0, and try crop_padding, flip, color_jitter or cutout"
                )
        if self.classes_per_batch is not None:
            raise ValueError(
                f"classes_per_batch={self.classes_per_batch}: it needs one class for each image, and a mask has "
                "several; leave it at null"
            )

    def can_shift(self, shift: Shift) -> bool:
        return "images" in shift.kinds and not shift.moves_pixels

    def check_labels(self, part: str, samples: Samples) -> None:
        """Check that all mask values are class indices or 255."""
        start = 0
        for masks in iterate_masks(samples):
            wrong = (masks != IGNORED_PIXEL) & (masks >= len(self.class_names))
            if wrong.any():
                row = int(wrong.flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"the {part} part has a mask with the class number {int(masks[wrong][0])} (sample {start + row}), "
                    f"and there are {len(self.class_names)} classes; use 0 to {len(self.class_names) - 1}, and "
                    f"{IGNORED_PIXEL} for pixels that do not count"
                )
            start += len(masks)

    def class_counts(self, samples: Samples) -> Tensor:
        total = torch.zeros(IGNORED_PIXEL + 1, dtype=torch.int64)
        for masks in iterate_masks(samples):
            total += masks.flatten().bincount(minlength=IGNORED_PIXEL + 1)
        return total[: len(self.class_names)]

    def split_holdout(self, samples: Samples, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
        return split_distinct(samples, lambda different: random_holdout(len(different), fraction, seed, name))

    def split_fold(self, samples: Samples) -> tuple[Tensor, Tensor]:
        assert self.folds is not None
        folds, fold, seed = self.folds, self.fold, self.split_seed
        return split_distinct(samples, lambda different: random_fold(len(different), folds, fold, seed))

    def describe_splits(self, train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
        assert isinstance(train, Samples)
        if missing := self.missing_classes(train):  # not an error: rare classes are common
            yield f"no training sample has the class {missing}"
        yield from self.describe_missing_classes(val, test)
        yield from describe_overlaps(train, val, test)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch._replace(targets=batch.targets.long())  # uint8 up to here, to save memory and bandwidth

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"pixel_classes": self.class_names}


def iterate_masks(samples: Samples) -> Iterator[Tensor]:
    """Yield the masks of a split in chunks `(n, H, W)`."""
    members = torch.arange(len(samples.tensors.targets)) if samples.members is None else samples.members
    for some in members.split(CHUNK):
        yield samples.tensors.targets[some]
