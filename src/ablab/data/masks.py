"""Images with masks: the class of each pixel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ablab.data.augment import Augment
from ablab.data.batch import IGNORED_PIXEL, Batch, Kind, Samples
from ablab.data.labelled import LabelledData, overlaps, random_fold, random_holdout, with_copies
from ablab.data.shifts import Shift
from ablab.data.stream import ImageStream

PIECE = 256  # masks that are looked at together: those of a mapped file may be more than memory holds


class Masks(LabelledData):
    """Images, each with a mask that has the number of a class at each pixel, or 255 where nothing counts.

    Validation parts and folds are drawn at random, since an image has several classes. A subclass's `load` gives the
    official parts, with masks of bytes `(N, H, W)` as targets, and sets `class_names`.

    Args:
        augment: what is done to training images; crop and flip move the mask along.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, C, H, W)`, targets `(N, H, W)`

    Raises:
        ValueError: class numbers that no class has, augmentation that mixes images, or what `LabelledData` refuses.
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
        """Refuse class numbers that no class has."""
        start = 0
        for masks in pieces(samples):
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
        for masks in pieces(samples):
            total += masks.flatten().bincount(minlength=IGNORED_PIXEL + 1)
        return total[: len(self.class_names)]

    def held_out(self, samples: Samples, fraction: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
        return with_copies(samples, lambda different: random_holdout(len(different), fraction, seed, name))

    def one_fold(self, samples: Samples) -> tuple[Tensor, Tensor]:
        assert self.folds is not None
        folds, fold, seed = self.folds, self.fold, self.split_seed
        return with_copies(samples, lambda different: random_fold(len(different), folds, fold, seed))

    def remarks_on(self, train: Samples | ImageStream, val: Samples, test: Samples) -> Iterator[str]:
        assert isinstance(train, Samples)
        if missing := self.missing_classes(train):  # rare classes are common: no error
            yield f"no training sample has the class {missing}"
        yield from self.without_samples(val, test)
        yield from overlaps(train, val, test)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch._replace(targets=batch.targets.long())  # bytes until they are on the device

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"pixel_classes": self.class_names}


def pieces(samples: Samples) -> Iterator[Tensor]:
    """Yield the masks of the split's own samples `(n, H, W)`, a few at a time."""
    members = torch.arange(len(samples.tensors.targets)) if samples.members is None else samples.members
    for some in members.split(PIECE):
        yield samples.tensors.targets[some]
