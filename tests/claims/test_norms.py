"""Claims N2 to N6 and S5, as far as they are properties: of the layers themselves, and of whole networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.models.resnet import ResNet
from ablab.models.rnn import RNN
from ablab.models.transformer import Transformer
from ablab.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm, Norm, WeightNorm

NETWORKS = ["images", "sequences", "text"]


def network(batch: Callable[..., Any], kind: str, norm: Norm) -> tuple[nn.Module, Tensor]:
    """A network in float64 without dropout, and real inputs."""
    data, sizes = batch(kind, 12)
    model: nn.Module
    if kind == "images":
        model = ResNet(**sizes, norm=norm, depth=8, width=8, zero_init_residual=False)
    elif kind == "sequences":
        model = Transformer(**sizes, norm=norm, embed_dim=16, num_heads=2, num_layers=2, dropout=0.0)
    else:
        model = RNN(**sizes, norm=norm, hidden_size=16, dropout=0.0)
    inputs: Tensor = data.inputs
    return model.double(), inputs.double() if inputs.is_floating_point() else inputs


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-12)


# N3: layer norm does not depend on the batch; train and eval agree --------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_with_layer_norm_a_sample_is_classified_alone_as_among_others_in_training_as_in_evaluation(
    batch: Callable[..., Any], kind: str
) -> None:
    model, inputs = network(batch, kind, LayerNorm())
    among = model(inputs)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(len(inputs))])
    assert same(alone, among)
    assert same(model.eval()(inputs), among)


@pytest.mark.parametrize("kind", NETWORKS)
def test_with_batch_norm_it_is_neither(batch: Callable[..., Any], kind: str) -> None:
    model, inputs = network(batch, kind, BatchNorm())
    among = model(inputs)
    assert not same(model(inputs[:6]), among[:6])
    assert not same(model.eval()(inputs), among)


@pytest.mark.parametrize(
    ("norm", "agrees"), [(LayerNorm(), True), (BatchNorm(), False)], ids=["layernorm", "batchnorm"]
)
@pytest.mark.parametrize("kind", [Transformer, RNN])
def test_sequences_of_variable_length_do_not_see_each_others_lengths(
    kind: type[nn.Module], norm: Norm, agrees: bool
) -> None:
    """A short sequence beside a long one, padded with what is not looked at, is classified as on its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16} if kind is RNN else {"embed_dim": 16, "num_heads": 2, "num_layers": 1}
    model = kind(in_features=3, num_classes=4, context_length=9, norm=norm, **sizes).double()
    short, long = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)
    padded = torch.cat([torch.cat([short, torch.full((2, 4, 3), 7.0)], 1), long])
    valid = torch.arange(9) < torch.tensor([[5], [5], [9], [9]])
    assert same(model(padded, valid)[:2], model(short)) == agrees


# N2: batch norm uses running averages in evaluation -----------------------------------------------------------------


def test_batch_norm_evaluates_with_running_averages_and_they_approach_those_of_the_data() -> None:
    norm = BatchNorm(momentum=0.1)(4, "image").double()
    data = torch.randn(64, 4, 3, 3, dtype=torch.float64) * 3 + 2
    assert same(norm.eval()(data), data / (1 + 1e-5) ** 0.5)  # before any step: mean 0, variance 1
    norm.train()
    for _ in range(300):
        norm(data[torch.randperm(64)[:32]])
    assert torch.allclose(norm.running_mean, data.mean((0, 2, 3)), atol=0.2)
    assert torch.allclose(norm.running_var, data.var((0, 2, 3)), rtol=0.1)


# N4: weight norm decouples length from direction -------------------------------------------------------------------


def test_weight_norms_length_is_g_whatever_v_is_and_a_step_only_lengthens_v() -> None:
    layer = NoNorm(weight=WeightNorm()).wrap(nn.Linear(8, 5)).double()
    length = layer.parametrizations.weight.original0
    direction = layer.parametrizations.weight.original1
    assert same(layer.weight.norm(dim=1), length.abs().flatten())
    inputs, targets = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    before = layer(inputs).detach()
    with torch.no_grad():
        direction *= 3
    assert same(layer(inputs), before)
    (layer(inputs) - targets).square().mean().backward()
    assert same((direction * direction.grad).sum(1), torch.zeros(5, dtype=torch.float64))
    old = direction.detach().norm(dim=1)
    torch.optim.SGD([direction], lr=0.5).step()
    assert torch.all(direction.norm(dim=1) > old)


# N5: instance norm removes an image's contrast and brightness -------------------------------------------------------


def restyled(images: Tensor) -> Tensor:
    """Each image's channels with a gain and an offset of their own."""
    shape = (len(images), images.shape[1], 1, 1)
    return images * (0.5 + torch.rand(shape, dtype=images.dtype)) + torch.randn(shape, dtype=images.dtype)


@pytest.mark.parametrize(
    ("norm", "forgives"),
    [(InstanceNorm(eps=1e-14), True), (GroupNorm(num_groups=2, eps=1e-14), False), (BatchNorm(eps=1e-14), False)],
    ids=["instancenorm", "groupnorm", "batchnorm"],
)
def test_instance_norm_alone_removes_each_images_gain_and_offset_of_each_channel(norm: Norm, forgives: bool) -> None:
    layer, images = norm(4, "image").double(), torch.randn(5, 4, 6, 6, dtype=torch.float64)
    assert same(layer(restyled(images)), layer(images)) == forgives


def test_one_gain_and_offset_for_all_channels_is_removed_by_layer_and_group_norm_too() -> None:
    images = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    other = images * 2.5 + 0.7
    for norm in (LayerNorm(eps=1e-14), GroupNorm(num_groups=2, eps=1e-14), InstanceNorm(eps=1e-14)):
        layer = norm(4, "image").double()
        assert same(layer(other), layer(images))


# N6: group norm lies between layer norm and instance norm -----------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "end"),
    [(GroupNorm(num_groups=1), LayerNorm()), (GroupNorm(num_groups=None, group_size=1), InstanceNorm())],
    ids=["layernorm", "instancenorm"],
)
def test_the_two_ends_of_group_norm_are_layer_and_instance_norm_in_a_whole_network(
    batch: Callable[..., Any], group: Norm, end: Norm
) -> None:
    model, inputs = network(batch, "images", group)
    other, _ = network(batch, "images", end)
    other.load_state_dict(model.state_dict())
    assert same(model(inputs), other(inputs))


# S5: normalized activations have one mean and one standard deviation ------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "over"),
    [(BatchNorm(eps=1e-14), (0, 2, 3)), (InstanceNorm(eps=1e-14), (2, 3)), (LayerNorm(eps=1e-14), (1, 2, 3))],
    ids=["batchnorm", "instancenorm", "layernorm"],
)
def test_what_is_normalized_together_has_mean_0_and_deviation_1_and_gain_and_shift_set_any_other(
    norm: Norm, over: tuple[int, ...]
) -> None:
    layer = norm(4, "image").double()
    images = torch.randn(6, 4, 5, 5, dtype=torch.float64) * 4 - 3
    out = layer(images)
    assert same(out.mean(over), torch.zeros_like(out.mean(over)))
    assert same(out.std(over, correction=0), torch.ones_like(out.mean(over)))
    with torch.no_grad():
        layer.weight.fill_(2.5)
        layer.bias.fill_(-1.0)
    out = layer(images)
    assert same(out.mean(over), torch.full_like(out.mean(over), -1.0))
    assert same(out.std(over, correction=0), torch.full_like(out.mean(over), 2.5))
    if isinstance(norm, BatchNorm):  # gamma and beta can undo the norm: the network loses nothing
        with torch.no_grad():
            layer.weight.copy_(images.std(over, correction=0))
            layer.bias.copy_(images.mean(over))
        assert same(layer(images), images)
