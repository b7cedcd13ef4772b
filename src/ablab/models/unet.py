"""U-Net for semantic segmentation."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.models.checks import check_positive
from ablab.models.interface import NormFactory
from ablab.models.resnet import convolution


class UNet(nn.Module):
    """A U-Net: an encoder and a decoder of convolution blocks with skip connections.

    Convolutions are padded, so that the logits have the size of the image. Any image size works: for odd sizes, pooling
    rounds up, and the upsampled features are cropped to match the skip connection.

    Args:
        in_channels: number of image channels.
        num_classes: number of classes.
        norm: factory of the norm layers, one after each convolution.
        width: channels of the first block; each deeper block doubles them.
        depth: number of downsampling steps.

    Shape:
        images `(N, in_channels, H, W)` -> logits `(N, num_classes, H, W)`

    Raises:
        ValueError: `width` or `depth` is below 1.

    References:
        Ronneberger et al. 2015 (there width 64, depth 4, no norm and no padding), https://arxiv.org/abs/1505.04597
    """

    takes: ClassVar = ("masks",)

    def __init__(
        self, in_channels: int, num_classes: int, *, norm: NormFactory, width: int = 64, depth: int = 4
    ) -> None:
        super().__init__()
        check_positive(width=width, depth=depth)
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            Block(before, channels, norm) for before, channels in zip([in_channels, *widths[:-1]], widths, strict=True)
        )
        self.ups = nn.ModuleList(UpConvolution(2 * channels, channels, norm) for channels in reversed(widths[:-1]))
        self.up = nn.ModuleList(Block(2 * channels, channels, norm) for channels in reversed(widths[:-1]))
        head = nn.Linear(width, num_classes)  # applied to every pixel, a 1x1 convolution
        nn.init.normal_(head.weight, std=width**-0.5)  # a smaller std takes hundreds of steps to learn the background
        nn.init.zeros_(head.bias)
        self.head = norm.wrap(head)

    def forward(self, images: Tensor) -> Tensor:
        *blocks, last = self.down
        x, skips = images, []
        for block in blocks:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2, ceil_mode=True)
        x = last(x)
        for up, block, skip in zip(self.ups, self.up, reversed(skips), strict=True):
            x = block(torch.cat([skip, up(x)[..., : skip.shape[2], : skip.shape[3]]], 1))
        return self.head(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """Two 3x3 convolutions, each followed by norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, 3, 1, norm)
        self.norm1 = norm(channels, "image", activation=nn.ReLU())
        self.conv2 = convolution(channels, channels, 3, 1, norm)
        self.norm2 = norm(channels, "image", activation=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class UpConvolution(nn.Module):
    """A transposed 2x2 convolution of stride 2 that doubles the image size, followed by a norm."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory) -> None:
        super().__init__()
        conv = nn.ConvTranspose2d(in_channels, channels, 2, 2)
        # each output pixel depends on one input pixel, so this std keeps the variance
        nn.init.normal_(conv.weight, std=in_channels**-0.5)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
        if not norm.needs_bias:  # removed after init, so that all norms get the same weights for a seed
            conv.register_parameter("bias", None)
        self.conv = norm.wrap(conv)
        self.norm = norm(channels, "image")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
