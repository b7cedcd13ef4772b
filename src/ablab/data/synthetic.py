"""Synthetic data of any size for benchmarks of speed and memory; accuracies on it are meaningless."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ablab.data.batch import Kind, Samples, Splits
from ablab.data.datamodule import DataModule
from ablab.data.labelled import LabelledData, OfficialSplits
from ablab.data.token_stream import Windows, split_points


class SyntheticImages(LabelledData):
    """Random uint8 images with one brighter row, whose position depends on the class.

    Args:
        num_samples: number of training and validation samples; a tenth as many test samples are added.
        image_size: side length in pixels.
        in_channels, num_classes: numbers of channels and classes.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, in_channels, image_size, image_size)`, targets `(N)`
    """

    kind: ClassVar[Kind] = "images"
    keep: ClassVar[tuple[int, ...]] = (1,)

    def __init__(
        self,
        *,
        num_samples: int = 10_000,
        image_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_positive(num_samples=num_samples, image_size=image_size, in_channels=in_channels, num_classes=num_classes)
        self.num_samples = num_samples
        self.image_size = image_size
        self.in_channels = in_channels
        self.class_names = [str(number) for number in range(num_classes)]

    def load(self) -> OfficialSplits:
        return OfficialSplits(self.make(self.num_samples, 0), self.make(max(1, self.num_samples // 10), 1))

    def make(self, num_samples: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        shape = (num_samples, self.in_channels, self.image_size, self.image_size)
        images = torch.randint(0, 192, shape, dtype=torch.uint8, generator=generator)
        targets = torch.arange(num_samples) % len(self.class_names)
        rows = targets * self.image_size // len(self.class_names)
        images[torch.arange(num_samples), :, rows] += 64
        return Samples(images, targets)

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": self.in_channels, "num_classes": len(self.class_names)}


class SyntheticSequences(LabelledData):
    """Random sequences whose mean depends on the class.

    Args:
        num_samples: number of training and validation samples; a tenth as many test samples are added.
        context_length, in_features, num_classes: length, number of features, and number of classes.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, context_length, in_features)`, targets `(N)`
    """

    kind: ClassVar[Kind] = "sequences"
    keep: ClassVar[tuple[int, ...]] = (2,)

    def __init__(
        self,
        *,
        num_samples: int = 10_000,
        context_length: int = 64,
        in_features: int = 16,
        num_classes: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_positive(
            num_samples=num_samples, context_length=context_length, in_features=in_features, num_classes=num_classes
        )
        self.num_samples = num_samples
        self.context_length = context_length
        self.in_features = in_features
        self.class_names = [str(number) for number in range(num_classes)]

    def load(self) -> OfficialSplits:
        return OfficialSplits(self.make(self.num_samples, 0), self.make(max(1, self.num_samples // 10), 1))

    def make(self, num_samples: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        targets = torch.arange(num_samples) % len(self.class_names)
        noise = torch.randn(num_samples, self.context_length, self.in_features, generator=generator)
        return Samples(noise + targets[:, None, None] / len(self.class_names), targets)

    @property
    def model_sizes(self) -> dict[str, int]:
        sizes = {"in_features": self.in_features, "context_length": self.context_length}
        return {**sizes, "num_classes": len(self.class_names)}


class SyntheticText(DataModule):
    """A random token stream in which each token is the previous one plus 0, 1, 2 or 3.

    Args:
        num_tokens: length of the stream; the last tenth is for testing.
        vocab_size, context_length: vocabulary size, and length of the windows.
        settings: see `DataModule`.

    Shape:
        inputs `(N, context_length)`, targets `(N, context_length)`
    """

    kind: ClassVar[Kind] = "text"

    def __init__(
        self, *, num_tokens: int = 1_000_000, vocab_size: int = 256, context_length: int = 128, **settings: Any
    ) -> None:
        super().__init__(**settings)
        check_positive(num_tokens=num_tokens, vocab_size=vocab_size, context_length=context_length)
        self.num_tokens = num_tokens
        self.vocab_size = vocab_size
        self.context_length = context_length

    def read(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        stream = torch.randint(0, 4, (self.num_tokens,), generator=generator).cumsum(0) % self.vocab_size
        begin, end, testing = split_points(self.num_tokens, self, 0.1)
        return Splits(
            train=Windows([stream[:begin], stream[end:testing]], self.context_length, keep_short=False),
            val=Windows([stream[begin:end]], self.context_length, keep_short=True),
            test=Windows([stream[testing:]], self.context_length, keep_short=True),
        )

    def names(self) -> list[str]:
        return [str(number) for number in range(self.vocab_size)]

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "context_length": self.context_length}

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"characters_per_token": 1.0}


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1, naming its keyword."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1 is needed")
