"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8, the embedded default."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ablab.data.datamodule import Kind, Splits, StandardizedData, TensorSplit, stratified_holdout

# The data set has no official split, so the project fixes one: it must be the same for every run and every user.
TEST_FRACTION = 0.2
TEST_SEED = 20100324


class Digits(StandardizedData):
    """Images of digits, 1,149 to train, 288 to validate, 360 to test at the default fraction.

    Args:
        val_fraction: held out of the training images for validation, with the classes in equal shares.
        split_seed: decides which; the test images are always the same.
        batch_size, seed, num_workers: see `DataModule`.

    Shape:
        inputs `(N, 1, 8, 8)`, targets `(N)`

    References:
        Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80 (its test part, as scikit-learn ships it)
    """

    kind: ClassVar[Kind] = "images"

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def read(self) -> Splits:
        images, targets = load_digits()
        images = self.arrange(images)
        rest, test = stratified_holdout(targets, TEST_FRACTION, TEST_SEED)
        kept, held_out = stratified_holdout(targets[rest], self.val_fraction, self.split_seed)
        train, val = rest[kept], rest[held_out]
        self.class_names = [str(digit) for digit in range(10)]
        self.standardize(images[train])
        return Splits(*(TensorSplit(images[part], targets[part]) for part in (train, val, test)))

    def arrange(self, images: Tensor) -> Tensor:
        """From `(N, 8, 8)` to the shape of a sample."""
        return images.unsqueeze(1)

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": 10}


def load_digits() -> tuple[Tensor, Tensor]:
    """Images `(1797, 8, 8)` of whole numbers from 0 to 16, and their digits `(1797)`."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    return torch.as_tensor(bunch.images, dtype=torch.uint8), torch.as_tensor(bunch.target, dtype=torch.long)
