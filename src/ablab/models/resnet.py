"""Residual networks for images, in the CIFAR and ImageNet styles of He et al. 2015."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ablab.models.checks import check_positive
from ablab.models.interface import NormFactory

# depth: (bottleneck, blocks in each stage), He et al. 2015, table 1
IMAGENET_DEPTHS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A residual network: stem, stages of residual blocks, global average pooling and a linear head.

    Args:
        in_channels: number of image channels.
        num_classes: number of classes.
        norm: factory of the norm layers.
        depth: number of weight layers; 6n + 2 for the style "cifar", 18, 34, 50, 101 or 152 for "imagenet".
        style: "cifar" has a 3x3 stem and three stages of basic blocks; "imagenet" has a 7x7 stem of stride 2, max
            pooling and four stages, with bottleneck blocks from depth 50 on.
        width: channels of the first stage; each later stage doubles them.
        zero_init_residual: zero-initialize the last norm of every residual branch (Goyal et al. 2017).

    Shape:
        images `(N, in_channels, H, W)` -> logits `(N, num_classes)`

    Raises:
        ValueError: the style has no network of this depth, or `width` is below 1.

    References:
        He et al. 2015, https://arxiv.org/abs/1512.03385
        Goyal et al. 2017, https://arxiv.org/abs/1706.02677
    """

    takes: ClassVar = ("images",)

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        norm: NormFactory,
        depth: int = 20,
        style: Literal["cifar", "imagenet"] = "cifar",
        width: int = 16,
        zero_init_residual: bool = True,
    ) -> None:
        super().__init__()
        check_positive(width=width)
        bottleneck, stage_blocks = stage_layout(depth, style)
        stem_kernel, stem_stride = (3, 1) if style == "cifar" else (7, 2)
        self.conv1 = convolution(in_channels, width, stem_kernel, stem_stride, norm)
        self.norm1 = norm(width, "image", activation=nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1) if style == "imagenet" else nn.Identity()
        stages = []
        channels = width
        for stage, num_blocks in enumerate(stage_blocks):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(Block(channels, width * 2**stage, stride, norm, bottleneck, zero_init_residual))
                channels = stages[-1].out_channels
        self.blocks = nn.Sequential(*stages)
        head = nn.Linear(channels, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.head = norm.wrap(head)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.norm1(self.conv1(images)))
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A residual block: basic (3x3, 3x3) or bottleneck (1x1, 3x3, 1x1 with four times the output channels).

    Where the shape changes, the shortcut is a 1x1 convolution with a norm (option B of the paper).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        norm: NormFactory,
        bottleneck: bool,
        zero_init_residual: bool,
    ) -> None:
        super().__init__()
        self.out_channels = channels * 4 if bottleneck else channels
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        # a bottleneck strides in its 3x3 convolution, as in torchvision (ResNet v1.5)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        widths = (in_channels, *[channels] * (len(kernels) - 1), self.out_channels)
        self.convs = nn.ModuleList(
            convolution(widths[i], widths[i + 1], kernels[i], strides[i], norm) for i in range(len(kernels))
        )
        # the last nonlinearity follows the sum with the shortcut
        activations = [nn.ReLU() for _ in kernels[1:]] + [None]
        self.norms = nn.ModuleList(
            norm(width, "image", activation=activation)
            for width, activation in zip(widths[1:], activations, strict=True)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != self.out_channels:
            self.shortcut = nn.Sequential(
                convolution(in_channels, self.out_channels, 1, stride, norm), norm(self.out_channels, "image")
            )
        if zero_init_residual:
            norm.zero_init(self.norms[-1], self.convs[-1])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(y))
        return F.relu(y + self.shortcut(x))


def stage_layout(depth: int, style: Literal["cifar", "imagenet"]) -> tuple[bool, tuple[int, ...]]:
    """Return whether the blocks are bottlenecks, and the number of blocks in each stage."""
    if style == "cifar":
        if depth < 8 or (depth - 2) % 6:
            nearest = max(8, 6 * round((depth - 2) / 6) + 2)
            raise ValueError(
                f"depth={depth}: a CIFAR-style ResNet has depth 6n + 2 (8, 14, 20, 26, 32, …); the nearest is {nearest}"
            )
        return False, ((depth - 2) // 6,) * 3
    if depth not in IMAGENET_DEPTHS:
        raise ValueError(f"depth={depth}: an ImageNet-style ResNet has depth {', '.join(map(str, IMAGENET_DEPTHS))}")
    return IMAGENET_DEPTHS[depth]


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int, norm: NormFactory) -> nn.Module:
    """Return a convolution with He initialization, with a bias if the norm after it needs one."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    if not norm.needs_bias:  # removed after init, so that all norms get the same weights for a seed
        conv.register_parameter("bias", None)
    return norm.wrap(conv)
