"""A model of your own: a small plain convolutional network, as a starting point."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ablab.models.checks import check_positive
from ablab.models.interface import NormFactory


class Template(nn.Module):
    """3x3 convolutions, each with a norm and a nonlinearity, then the mean over pixels and a classifier.

    To make it yours, change what the constructor builds and what `forward` does with it. `takes` says what the model
    reads, and the data give the arguments before the `*`: for "images" these two, for "sequences" `in_features`,
    `context_length` and `num_classes`, for "text" `vocab_size` and `context_length`. Ask `norm` for every norm, along
    with the nonlinearity behind it, and let it wrap every layer whose weight it may reparametrize. Each argument behind
    the `*`, but the norm, is a key of the YAML, conf/model/template.yaml.

    Args:
        in_channels: the images' channels.
        num_classes: the classes to tell apart.
        norm: makes the norm layers.
        depth: convolutions; each but the first halves the image.
        width: channels of the first; each later one doubles them.

    Shape:
        images `(N, in_channels, H, W)` -> logits `(N, num_classes)`

    Raises:
        ValueError: a size below 1.
    """

    takes: ClassVar = ("images",)

    def __init__(
        self, in_channels: int, num_classes: int, *, norm: NormFactory, depth: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        check_positive(depth=depth, width=width)
        layers: list[nn.Module] = []
        channels = in_channels
        for i in range(depth):
            conv = nn.Conv2d(channels, width * 2**i, 3, stride=1 if i == 0 else 2, padding=1)
            if not norm.needs_bias:  # last, so that the same seed draws the same weights for every norm
                conv.register_parameter("bias", None)
            channels = conv.out_channels
            layers += [norm.wrap(conv), norm(channels, "image", activation=nn.ReLU())]
        self.layers = nn.Sequential(*layers)
        self.head = norm.wrap(nn.Linear(channels, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))
