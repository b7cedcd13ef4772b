"""The discriminator of DCGAN as a classifier; `task=gan` replaces its head."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from ablab.models.checks import check_positive
from ablab.models.interface import NormFactory


class DCGAN(nn.Module):
    """The DCGAN discriminator: strided convolutions with leaky ReLUs, global average pooling and a linear head.

    As in the paper, the first convolution has no norm. Average pooling allows images of any size; 8x8 images at depth 3
    shrink to a single pixel, as in the paper.

    Args:
        in_channels: number of image channels.
        num_classes: number of classes.
        norm: factory of the norm layers.
        width: channels of the first convolution; each later one doubles them.
        depth: number of convolutions; at least 2, since the first has no norm.

    Shape:
        images `(N, in_channels, H, W)` -> logits `(N, num_classes)`

    Raises:
        ValueError: `width` or `depth` is too small.

    References:
        Radford et al. 2015, https://arxiv.org/abs/1511.06434
    """

    takes: ClassVar = ("images",)

    def __init__(
        self, in_channels: int, num_classes: int, *, norm: NormFactory, width: int = 32, depth: int = 2
    ) -> None:
        super().__init__()
        check_positive(width=width)
        if depth < 2:
            raise ValueError(f"depth={depth}: at least 2 convolutions are needed; the first has no norm")
        channels = [width * 2**i for i in range(depth)]
        layers: list[nn.Module] = [norm.wrap(strided_conv(in_channels, width)), nn.LeakyReLU(0.2)]
        for before, after in pairwise(channels):
            conv = strided_conv(before, after)
            if not norm.needs_bias:  # removed after init, so that all norms get the same weights for a seed
                conv.register_parameter("bias", None)
            layers += [norm.wrap(conv), norm(after, "image", activation=nn.LeakyReLU(0.2))]
        self.layers = nn.Sequential(*layers)
        head = nn.Linear(channels[-1], num_classes)
        nn.init.zeros_(head.bias)
        self.head = norm.wrap(head)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).mean((2, 3)))


def strided_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 4x4 convolution of stride 2 with He initialization for leaky ReLUs."""
    conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
    nn.init.kaiming_normal_(conv.weight, a=0.2)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
