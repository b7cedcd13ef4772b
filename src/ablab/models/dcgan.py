"""The discriminator of DCGAN, as a classifier: `task=gan` gives it a head of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from ablab.models.interface import NormFactory
from ablab.models.sizes import at_least_one


class DCGAN(nn.Module):
    """Convolutions that halve the image, leaky ReLUs, the mean over pixels, a classifier.

    As in the paper, the first convolution has no norm. The mean over pixels takes images of any size; for those of 8x8
    at a depth of 3, it is over one pixel, as in the paper.

    Args:
        in_channels: the image's channels.
        num_classes: the classes to tell apart.
        norm: makes the norm layers.
        width: channels of the first convolution; each has twice those of the one before.
        depth: convolutions; at least 2, since the first has no norm.

    Shape:
        images `(N, in_channels, H, W)` -> logits `(N, num_classes)`

    Raises:
        ValueError: a size that is too small.

    References:
        Radford et al. 2015, https://arxiv.org/abs/1511.06434
    """

    takes: ClassVar = ("images",)

    def __init__(
        self, in_channels: int, num_classes: int, *, norm: NormFactory, width: int = 32, depth: int = 2
    ) -> None:
        super().__init__()
        at_least_one(width=width)
        if depth < 2:
            raise ValueError(f"depth={depth}: at least 2 convolutions are needed; the first has no norm")
        channels = [width * 2**i for i in range(depth)]
        layers: list[nn.Module] = [norm.wrap(halving(in_channels, width)), nn.LeakyReLU(0.2)]
        for before, after in pairwise(channels):
            conv = halving(before, after)
            if not norm.needs_bias:  # only now: the same seed draws the same weights for every norm
                conv.register_parameter("bias", None)
            layers += [norm.wrap(conv), norm(after, "image", activation=nn.LeakyReLU(0.2))]
        self.layers = nn.Sequential(*layers)
        head = nn.Linear(channels[-1], num_classes)
        nn.init.zeros_(head.bias)
        self.head = norm.wrap(head)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


def halving(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a convolution of stride 2, initialized for leaky ReLUs."""
    conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
