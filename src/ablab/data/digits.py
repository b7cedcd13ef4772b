"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8, the embedded default."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ablab.data.batch import Kind, Samples
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, LabelledData, Official, hold_out


class Digits(LabelledData):
    """Images of digits, 1,149 to train, 288 to validate, 360 to test at the default fraction.

    Args:
        val_fraction: held out of the training images for validation; the test images are always the same.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, 1, 8, 8)`, targets `(N)`

    References:
        Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80 (its test part, as scikit-learn ships it)
    """

    kind: ClassVar[Kind] = "images"
    value_range: ClassVar[tuple[float, float]] = (0.0, 16.0)

    def __init__(self, *, val_fraction: float = 0.2, **settings: Any) -> None:
        super().__init__(val_fraction=val_fraction, **settings)

    def load(self) -> Official:
        images, targets = load_digits()
        images = self.arrange(images)
        self.class_names = [str(digit) for digit in range(10)]
        samples = Samples(images, targets)
        rest, test = hold_out(samples, TEST_FRACTION, TEST_SEED)
        return Official(samples.part(rest), samples.part(test))

    def arrange(self, images: Tensor) -> Tensor:
        """From `(N, 8, 8)` to the shape of a sample."""
        return images.unsqueeze(1)

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": 10}


def shipped_file(name: str) -> Path:
    """Return a file that scikit-learn ships; importing scikit-learn would take a quarter of a short run's start."""
    [package] = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(package) / "datasets" / "data" / name


def load_digits() -> tuple[Tensor, Tensor]:
    """Images `(1797, 8, 8)` of whole numbers from 0 to 16, and their digits `(1797)`."""
    rows = np.loadtxt(shipped_file("digits.csv.gz"), delimiter=",", dtype=np.int64)
    table = torch.from_numpy(rows)
    return table[:, :-1].view(-1, 8, 8).to(torch.uint8), table[:, -1].contiguous()
