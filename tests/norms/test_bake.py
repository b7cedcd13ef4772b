"""Baked for export: the same outputs from plain weights, and a graph that torch.export takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tests.conftest import choices
from tests.pairs import in_turn
from torch import nn
from torch.nn.utils import parametrize

from ablab.lab.config.build import build
from ablab.norms import BatchNorm, LayerNorm, NormLayer, WeightNorm, bake

PLACES = [
    ("resnet", "images"),
    ("unet", "masks"),
    ("mlp", "vectors"),
    ("transformer", "sequences"),
    ("transformer", "text"),
    ("rnn", "sequences"),
]


def trained(model: Any, norm: Any, kind: str, batch: Callable[..., Any]) -> tuple[nn.Module, Any]:
    """Return a model whose weights and averages have moved a little, and inputs for it."""
    example, sizes = batch(kind)
    model = build(model, norm=build(norm), **sizes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(example.inputs).square().mean().backward()
        optimizer.step()
    return model.eval(), example.inputs


@pytest.mark.parametrize(("model_name", "kind", "norm"), in_turn(PLACES))
def test_a_baked_model_computes_the_same_and_is_exported(
    model_name: str, kind: str, norm: str, config: Callable[..., DictConfig], batch: Callable[..., Any]
) -> None:
    words = ["model.hidden_size=16"] if model_name == "rnn" else []
    model, inputs = trained(config(f"model={model_name}", *words).model, config(f"norm={norm}").norm, kind, batch)
    with torch.no_grad():
        expected = model(inputs)
        baked = bake(model)
        torch.testing.assert_close(baked(inputs), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(inputs), expected)  # the original stays
        assert not any(parametrize.is_parametrized(module) for module in baked.modules())
        exported = torch.export.export(baked, (inputs,)).module()
        torch.testing.assert_close(exported(inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [BatchNorm(), BatchNorm(mean_only=True), BatchNorm(affine=False, weight=WeightNorm())])
def test_every_batch_norm_of_a_resnet_is_folded(norm: BatchNorm) -> None:
    from ablab.models.resnet import ResNet

    model = ResNet(3, 10, norm=norm, depth=14, width=8).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for _ in range(3):
        model(x)
    baked = bake(model)
    assert not any(isinstance(module, NormLayer) for module in baked.modules())
    torch.testing.assert_close(baked(x), model.eval()(x), rtol=1e-10, atol=1e-10)


class Shared(nn.Module):
    """What must not be folded: an output that is read twice, and a norm that has something between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm1, self.norm2 = BatchNorm()(4, "sequence"), BatchNorm()(4, "sequence")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.norm1(y) + y + self.norm2(torch.relu(self.second(x)))


def test_a_batch_norm_that_is_not_alone_behind_its_layer_stays() -> None:
    model = Shared()
    x = torch.randn(4, 5, 4)
    model(x)
    baked = bake(model)
    assert sum(isinstance(module, NormLayer) for module in baked.modules()) == 2
    torch.testing.assert_close(baked(x), model.eval()(x))


@pytest.mark.parametrize("linear", [nn.Conv1d(3, 4, 2), nn.Conv3d(3, 4, 2), nn.Conv2d(3, 4, 2, bias=False)])
def test_batch_norm_is_folded_behind_every_kind_of_convolution(linear: nn.Module) -> None:
    model = nn.Sequential(linear, BatchNorm()(4, "image")).double()
    dims = linear.weight.dim() - 2
    x = torch.randn(5, 3, *[6] * dims, dtype=torch.float64)
    for parameter in model[1].parameters():
        nn.init.normal_(parameter)
    model(x)
    baked = bake(model)
    assert not isinstance(baked[1], NormLayer)
    torch.testing.assert_close(baked(x), model.eval()(x))


def test_a_model_without_anything_to_bake_is_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 8), LayerNorm()(8, "sequence"))
    x = torch.randn(2, 3, 4)
    assert torch.equal(bake(model)(x), model(x))
    assert bake(model)[0].weight is not model[0].weight


class Called(nn.Module):
    """Calls its parts by keywords, and reads a length."""

    def __init__(self, *, traceable: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 1), BatchNorm()(4, "image")
        self.traceable = traceable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x=self.conv(input=x))
        return y if self.traceable else y / len(x)


@pytest.mark.parametrize("traceable", [True, False])
def test_a_model_is_baked_however_it_calls_its_parts(traceable: bool) -> None:
    model, x = Called(traceable=traceable), torch.randn(5, 3, 6)
    model(x)
    baked = bake(model)
    assert isinstance(baked.norm, NormLayer) != traceable
    torch.testing.assert_close(baked(x), model.eval()(x))


class Reread(nn.Module):
    """An autoencoder whose weight is read again, behind the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), BatchNorm()(6, "sequence")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.norm(self.linear(x)), self.linear.weight.t())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 4), BatchNorm()(4, "image")), (3, 4, 5)),
        (nn.Sequential(nn.Conv1d(3, 8, 1), BatchNorm()(8, "sequence")), (2, 3, 8)),
        (nn.Sequential(nn.Linear(5, 4), BatchNorm().recurrent(4, "input", num_steps=3)), (2, 3, 5)),
        (Reread(), (2, 3, 4)),
    ],
    ids=["over rows", "over steps", "in a recurrence", "read again"],
)
def test_a_batch_norm_over_other_features_than_the_outputs_stays(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model(x)
    torch.testing.assert_close(bake(model)(x), model.eval()(x))


@pytest.mark.parametrize(
    "norm",
    [pytest.param(norm, marks=[pytest.mark.thorough] * (i % 2)) for i, norm in enumerate(choices("norm"))],
)
def test_a_resnet_is_exported_for_images_of_any_size(norm: str, config: Callable[..., DictConfig]) -> None:
    from ablab.models.resnet import ResNet

    model = ResNet(3, 10, norm=build(config(f"norm={norm}").norm), depth=8, width=8)
    model(torch.randn(4, 3, 16, 16))
    size = torch.export.Dim("size", min=2, max=64)
    exported = torch.export.export(
        bake(model), (torch.randn(2, 3, 16, 16),), dynamic_shapes=({2: 4 * size, 3: 4 * size},)
    ).module()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), bake(model)(x), rtol=1e-4, atol=1e-5)
