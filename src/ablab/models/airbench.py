"""The convolutional network of the airbench CIFAR-10 speedruns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.models.checks import check_positive
from ablab.models.interface import NormFactory

PATCH = 2  # side length of the patches that the first convolution whitens
RIDGE = 5e-4  # added to the eigenvalues of the patch covariance


class Airbench(nn.Module):
    """Airbench: a fixed whitening convolution, blocks of two 3x3 convolutions, global max pooling and a linear head.

    The filters of the first convolution are the principal components of the training data's 2x2 patches, scaled to unit
    variance, and their negatives; `init_from_data` sets them, and only the bias is trained. The other convolutions are
    initialized to the identity on their input channels. Blocks do not pool a 1x1 image further.

    Args:
        in_channels: number of image channels.
        num_classes: number of classes.
        norm: factory of the norm layers.
        widths: channels of each block.
        norm_gain: train the gains of the norms; their shifts are always trained.
        logit_scale: factor on the logits.

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
        check_positive(**{f"widths[{i}]": width for i, width in enumerate(widths)})
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
        """Set the whitening convolution from training images `(N, in_channels, H, W)`, as `forward` receives them."""
        covariance = torch.zeros(())
        count = 0
        for chunk in images.split(500):
            patches = F.unfold(chunk.double(), PATCH).transpose(1, 2).flatten(0, 1)
            covariance = covariance + patches.T @ patches
            count += len(patches)
        variances, directions = torch.linalg.eigh(covariance / count)
        scaled = (directions / (variances + RIDGE).sqrt()).T.view(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([scaled, -scaled]))


class Block(nn.Module):
    """Two 3x3 convolutions, each followed by norm and GELU, with 2x2 max pooling after the first convolution."""

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
    """Return a 3x3 convolution initialized to pass its inputs through, with a bias if the norm after it needs one."""
    conv = nn.Conv2d(in_channels, channels, 3, padding=1)
    assert conv.bias is not None
    nn.init.dirac_(conv.weight[:in_channels])
    nn.init.zeros_(conv.bias)
    if not norm.needs_bias:  # removed after init, so that all norms get the same weights for a seed
        conv.register_parameter("bias", None)
    return norm.wrap(conv)
