"""The small convolutional network of the CIFAR-10 speed runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.models.interface import NormFactory
from ablab.models.sizes import at_least_one

PATCH = 2  # side of the patches that the first convolution whitens
RIDGE = 5e-4  # added to the variance of each of their directions


class Airbench(nn.Module):
    """Patches whitened by a fixed convolution, three blocks of two 3x3 convolutions, the largest over pixels, a head.

    The first convolution gives every principal direction of the training data's 2x2 patches, scaled to unit variance,
    and its negative; `init_from_data` sets it, and only its bias is learned. The others begin as the identity on as
    many channels as they are given. An image that is down to one pixel is pooled no further.

    Args:
        in_channels: the image's channels.
        num_classes: the classes to tell apart.
        norm: makes the norm layers.
        widths: channels of the blocks.
        norm_gain: whether the norms learn a gain; their shift they do.
        logit_scale: multiplies the head's outputs.

    Shape:
        images `(N, in_channels, H, W)` -> logits `(N, num_classes)`

    References:
        Jordan 2024 (airbench94), https://arxiv.org/abs/2404.00498
    """

    takes: ClassVar = ("images",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        norm: NormFactory,
        widths: Sequence[int] = (64, 256, 256),
        norm_gain: bool = False,
        logit_scale: float = 1 / 9,
    ) -> None:
        super().__init__()
        at_least_one(**{f"widths[{i}]": width for i, width in enumerate(widths)})
        whitened = 2 * in_channels * PATCH**2
        self.whiten = nn.Conv2d(in_channels, whitened, PATCH)
        assert self.whiten.bias is not None
        nn.init.zeros_(self.whiten.bias)
        self.whiten.weight.requires_grad_(False)
        before = (whitened, *widths)
        self.blocks = nn.Sequential(*(Block(before[i], width, norm, norm_gain) for i, width in enumerate(widths)))
        self.head = norm.wrap(nn.Linear(before[-1], num_classes, bias=False))
        self.logit_scale = logit_scale

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.gelu(self.whiten(images)))
        return self.head(x.amax((2, 3))) * self.logit_scale

    @torch.no_grad()
    def init_from_data(self, images: Tensor) -> None:
        """Set the first convolution from training images, as the network is given them `(N, in_channels, H, W)`."""
        covariance = torch.zeros(())
        count = 0
        for some in images.split(500):
            patches = F.unfold(some.double(), PATCH).transpose(1, 2).flatten(0, 1)
            covariance = covariance + patches.T @ patches
            count += len(patches)
        variances, directions = torch.linalg.eigh(covariance / count)
        scaled = (directions / (variances + RIDGE).sqrt()).T.view(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([scaled, -scaled]))


class Block(nn.Module):
    """Two 3x3 convolutions, each with its norm and GELU; the first halves the image before its norm."""

    def __init__(self, in_channels: int, channels: int, norm: NormFactory, norm_gain: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList([convolution(in_channels, channels, norm), convolution(channels, channels, norm)])
        self.norms = nn.ModuleList(norm(channels, "image", activation=nn.GELU()) for _ in range(2))
        for layer in self.norms:
            gain = getattr(layer, "weight", None)
            if isinstance(gain, nn.Parameter) and not norm_gain:
                gain.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x)
        if min(x.shape[2:]) > 1:
            x = F.max_pool2d(x, 2)
        x = self.norms[0](x)
        return self.norms[1](self.convs[1](x))


def convolution(in_channels: int, channels: int, norm: NormFactory) -> nn.Module:
    """A 3x3 convolution whose first channels hand their inputs on; it has a bias where the norm behind it has none."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=1)
    assert conv.bias is not None
    nn.init.dirac_(conv.weight[:in_channels])
    nn.init.zeros_(conv.bias)
    if not norm.needs_bias:  # only now: the same seed draws the same weights for every norm
        conv.register_parameter("bias", None)
    return norm.wrap(conv)
