"""The digits as sequences of rows, with the same images, splits and labels as `Digits`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ablab.data.batch import Kind
from ablab.data.digits import Digits


class DigitsRows(Digits):
    """Digits as sequences of 8 steps with 8 pixels each; see `Digits`.

    Shape:
        inputs `(N, 8, 8)`, targets `(N)`
    """

    kind: ClassVar[Kind] = "sequences"

    def arrange(self, images: Tensor) -> Tensor:
        return images

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_features": 8, "context_length": 8, "num_classes": 10}
