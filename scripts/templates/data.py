"""A data set of your own: generated images of bars, as a starting point."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ablab.data.batch import Kind, Samples
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, LabelledData, OfficialSplits, hold_out

NAMES = ["horizontal", "vertical", "rising", "falling"]
SIZE = 16  # pixels of each side


class Template(LabelledData):
    """Images of a bar in noise, classified by the direction of the bar.

    To make it yours, let `load` read your files into tensors: inputs `(N, C, H, W)`, or `(N, L, features)` of the kind
    "sequences"; targets `(N)`, whole numbers from 0; a name for each in `class_names`. Where the data have an official
    test part, give that to `OfficialSplits` instead of holding one out. Return the sizes that a model needs in
    `model_sizes`. All else is inherited: the validation part and folds, standardization by the training part,
    augmentation, shifts, batches, and a fingerprint of every sample, which each run records. An argument of the
    constructor is a key of the YAML, conf/data/template.yaml.

    Args:
        num_samples: images in all; a fifth of them is the test part, the same for every run.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, 1, 16, 16)`, targets `(N)`

    Raises:
        ValueError: fewer than 100 samples.
    """

    kind: ClassVar[Kind] = "images"

    def __init__(self, *, num_samples: int = 1000, **settings: Any) -> None:
        super().__init__(**settings)
        if num_samples < 100:
            raise ValueError(f"num_samples={num_samples}: at least 100 are needed for three parts of four classes")
        self.num_samples = num_samples

    def load(self) -> OfficialSplits:
        generator = torch.Generator().manual_seed(0)  # the same samples for every seed of a run
        targets = torch.arange(self.num_samples) % len(NAMES)
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        across = torch.stack([rows, columns, (rows + columns) / 2, (rows - columns + SIZE) / 2])
        centers = SIZE * (0.25 + 0.5 * torch.rand(self.num_samples, 1, 1, generator=generator))
        bars = (across[targets] - centers).abs() < 1.5
        noise = torch.randint(0, 192, bars.shape, generator=generator)
        inputs = (noise + 63 * bars).to(torch.uint8).unsqueeze(1)
        self.class_names = NAMES
        samples = Samples(inputs, targets)
        rest, test = hold_out(samples, TEST_FRACTION, TEST_SEED)
        return OfficialSplits(samples.part(rest), samples.part(test))

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": len(NAMES)}
