"""Handwritten digits shipped with scikit-learn: 1,797 images of 8x8 pixels, the default data set."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ablab.data.batch import Kind, Samples
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, LabelledData, OfficialSplits, hold_out


class Digits(LabelledData):
    """Images of digits: 1,149 training, 288 validation and 360 test images by default.

    Args:
        val_fraction: fraction of the training images held out for validation; the test images are fixed.
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

    def load(self) -> OfficialSplits:
        images, targets = load_digits()
        images = self.arrange(images)
        self.class_names = [str(digit) for digit in range(10)]
        samples = Samples(images, targets)
        rest, test = hold_out(samples, TEST_FRACTION, TEST_SEED)
        return OfficialSplits(samples.part(rest), samples.part(test))

    def arrange(self, images: Tensor) -> Tensor:
        """Reshape images `(N, 8, 8)` to samples."""
        return images.unsqueeze(1)

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": 10}


def shipped_file(name: str) -> Path:
    """Return the path of a file shipped with scikit-learn, without the cost of importing scikit-learn."""
    [package] = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr,misc]
    return Path(package) / "datasets" / "data" / name


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images `(1797, 8, 8)` with integers from 0 to 16, and their digits `(1797)`."""
    rows = np.loadtxt(shipped_file("digits.csv.gz"), delimiter=",", dtype=np.int64)
    table = torch.from_numpy(rows)
    return table[:, :-1].view(-1, 8, 8).to(torch.uint8), table[:, -1].contiguous()
