"""Scenes of the handwritten digits that scikit-learn ships, with the class of each pixel."""

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
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, Official, hold_out
from ablab.data.masks import Masks

SIDE = 24  # pixels of a scene
DIGIT = 8  # pixels of a digit
INK = 4  # of 16: the faintest pixel that is taken for a part of the digit
NOISE = 2.0  # of 16: standard deviation
SEED = 20150518  # the same scenes for every run and every user


class DigitScenes(Masks):
    """One to three digits on a noisy ground, none over another: 575 scenes to train, 144 to validate, 180 to test.

    Every digit is in one scene, so that no digit is in two parts. The mask has the digit's class where its ink is, and
    background elsewhere.

    Args:
        val_fraction: held out of the training scenes for validation; the test scenes are always the same.
        settings: see `Masks`, `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, 1, 24, 24)`, targets `(N, 24, 24)`

    References:
        Alpaydin & Kaynak 1998 (the digits), https://archive.ics.uci.edu/dataset/80
    """

    value_range = (0.0, 16.0)

    def __init__(self, *, val_fraction: float = 0.2, **settings: Any) -> None:
        super().__init__(val_fraction=val_fraction, **settings)

    def load(self) -> Official:
        images, digits = load_digits()
        self.class_names = ["background", *(str(digit) for digit in range(10))]
        parts = hold_out(Samples(images, digits), TEST_FRACTION, TEST_SEED)
        train, test = (scenes(images[part], digits[part]) for part in parts)
        return Official(train, test)

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": len(self.class_names)}


def scenes(images: Tensor, digits: Tensor) -> Samples:
    """Place each digit in a scene, one, two and three of them in turn.

    Shape:
        images `(N, 8, 8)` of whole numbers from 0 to 16, digits `(N)`
    """
    rng = np.random.RandomState(SEED)
    order = rng.permutation(len(images))
    ends = np.cumsum(np.resize([1, 2, 3], len(order)))
    groups = np.split(order, ends[ends < len(order)])
    inputs = np.zeros((len(groups), 1, SIDE, SIDE), dtype=np.uint8)
    masks = np.zeros((len(groups), SIDE, SIDE), dtype=np.uint8)
    for group, scene, mask in zip(groups, inputs[:, 0], masks, strict=True):
        for number, (top, left) in zip(group, corners(rng, len(group)), strict=True):
            window = np.s_[top : top + DIGIT, left : left + DIGIT]
            scene[window] = images[number]
            mask[window] = np.where(images[number] >= INK, digits[number] + 1, 0)
        scene[:] = np.rint(scene + rng.normal(scale=NOISE, size=scene.shape)).clip(0, 16)
    return Samples(torch.from_numpy(inputs), torch.from_numpy(masks))


def corners(rng: RandomState, count: int) -> NDArray[Any]:
    """Draw the upper left corners `(count, 2)` of digits that do not overlap."""
    while True:
        drawn = rng.randint(0, SIDE - DIGIT + 1, (count, 2))
        if all(np.abs(one - other).max() >= DIGIT for one, other in combinations(drawn, 2)):
            return drawn
