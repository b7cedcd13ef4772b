"""U-Net: the published architecture, for images of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.models.unet import UNet
from ablab.norms import BatchNorm, NoNorm


def test_without_norms_it_has_the_parameters_of_the_published_network() -> None:
    """From table and figure of Ronneberger et al. 2015: 23 convolutions, one channel in, two classes out."""
    with torch.device("meta"):
        model = UNet(1, 2, norm=NoNorm())
    widths, total, before = [64, 128, 256, 512, 1024], 0, 1
    for width in widths:
        total, before = total + 9 * before * width + width + 9 * width * width + width, width
    for width in widths[-2::-1]:  # up-convolution, then a block that also sees what was copied
        total += 4 * 2 * width * width + width + 9 * 2 * width * width + width + 9 * width * width + width
    assert sum(p.numel() for p in model.parameters()) == total + 64 * 2 + 2 == 31_030_658
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert len(weights) == 23


def test_it_computes_what_torchs_own_layers_do() -> None:
    model = UNet(2, 3, norm=NoNorm(), width=4, depth=2)
    state = model.state_dict()

    def block(x: Tensor, name: str) -> Tensor:
        for number in (1, 2):
            x = F.relu(F.conv2d(x, state[f"{name}.conv{number}.weight"], state[f"{name}.conv{number}.bias"], padding=1))
        return x

    images = torch.randn(2, 2, 12, 8)
    first = block(images, "down.0")
    second = block(F.max_pool2d(first, 2), "down.1")
    x = block(F.max_pool2d(second, 2), "down.2")
    for number, skip in enumerate((second, first)):
        up = F.conv_transpose2d(x, state[f"ups.{number}.conv.weight"], state[f"ups.{number}.conv.bias"], stride=2)
        x = block(torch.cat([skip, up], 1), f"up.{number}")
    expected = F.conv2d(x, state["head.weight"][:, :, None, None], state["head.bias"])
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("size", [(8, 8), (7, 13), (1, 5), (24, 9)])
def test_images_of_any_size_have_logits_of_their_size(size: tuple[int, int]) -> None:
    model = UNet(1, 5, norm=BatchNorm(), width=4, depth=3)
    assert model(torch.randn(2, 1, *size)).shape == (2, 5, *size)


def test_every_pixel_of_an_image_of_odd_size_matters_to_its_own_logits() -> None:
    model = UNet(1, 2, norm=NoNorm(), width=4, depth=2)
    nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
    images = torch.randn(1, 1, 7, 5, requires_grad=True)
    for row, column in ((0, 0), (6, 4), (3, 2)):
        [gradient] = torch.autograd.grad(model(images)[0, 0, row, column], images)
        assert gradient[0, 0, row, column] != 0


@pytest.mark.parametrize("name", ["width", "depth"])
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: at least 1 is needed"):
        UNet(1, 2, norm=NoNorm(), **{name: 0})
