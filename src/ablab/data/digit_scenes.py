"""Synthetic segmentation scenes composed of scikit-learn's handwritten digits."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor

from ablab.data.batch import Samples
from ablab.data.digits import load_digits
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, OfficialSplits, hold_out
from ablab.data.masks import Masks

SIDE = 24  # side length of a scene in pixels
DIGIT = 8  # side length of a digit in pixels
INK = 4  # minimum pixel value, of 16, that counts as part of a digit
NOISE = 2.0  # standard deviation of the noise; pixel values go up to 16
SEED = 20150518  # fixed, so that all runs have the same scenes


class DigitScenes(Masks):
    """Scenes of one to three digits without overlap on a noisy background: 575 training, 144 validation, 180 test.

    Every digit image appears in one scene only, so that splits share no digits. Mask pixels have the class of the digit
    where there is ink, and background elsewhere.

    Args:
        val_fraction: fraction of the training scenes held out for validation; the test scenes are fixed.
        settings: see `Masks`, `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, 1, 24, 24)`, targets `(N, 24, 24)`

    References:
        Alpaydin & Kaynak 1998 (the digits), https://archive.ics.uci.edu/dataset/80
    """

    value_range = (0.0, 16.0)

    def __init__(self, *, val_fraction: float = 0.2, **settings: Any) -> None:
        super().__init__(val_fraction=val_fraction, **settings)

    def load(self) -> OfficialSplits:
        images, digits = load_digits()
        self.class_names = ["background", *(str(digit) for digit in range(10))]
        parts = hold_out(Samples(images, digits), TEST_FRACTION, TEST_SEED)
        train, test = (make_scenes(images[part], digits[part]) for part in parts)
        return OfficialSplits(train, test)

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": len(self.class_names)}


def make_scenes(images: Tensor, digits: Tensor) -> Samples:
    """Place all digits in scenes of one, two and three digits in turn.

    Shape:
        images `(N, 8, 8)` with integers from 0 to 16, digits `(N)`
    """
    rng = np.random.RandomState(SEED)
    order = rng.permutation(len(images))
    ends = np.cumsum(np.resize([1, 2, 3], len(order)))
    groups = np.split(order, ends[ends < len(order)])
    inputs = np.zeros((len(groups), 1, SIDE, SIDE), dtype=np.uint8)
    masks = np.zeros((len(groups), SIDE, SIDE), dtype=np.uint8)
    for group, scene, mask in zip(groups, inputs[:, 0], masks, strict=True):
        for number, (top, left) in zip(group, draw_corners(rng, len(group)), strict=True):
            window = np.s_[top : top + DIGIT, left : left + DIGIT]
            scene[window] = images[number]
            mask[window] = np.where(images[number] >= INK, digits[number] + 1, 0)
        scene[:] = np.rint(scene + rng.normal(scale=NOISE, size=scene.shape)).clip(0, 16)
    return Samples(torch.from_numpy(inputs), torch.from_numpy(masks))


def draw_corners(rng: RandomState, count: int) -> NDArray[Any]:
    """Draw upper left corners `(count, 2)` of non-overlapping digits, by rejection sampling."""
    while True:
        drawn = rng.randint(0, SIDE - DIGIT + 1, (count, 2))
        if all(np.abs(one - other).max() >= DIGIT for one, other in combinations(drawn, 2)):
            return drawn
