"""The layers against torch's, against the formulas of the papers in float64, and against each other at their limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.norms import (
    BatchNorm,
    DyT,
    EvoNormB0,
    EvoNormS0,
    FilterResponseNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Norm,
    RMSNorm,
)


def images(n: int = 4, c: int = 8) -> Tensor:
    return torch.randn(n, c, 5, 6, dtype=torch.float64) * 3 + 1


def sequences(n: int = 4, length: int = 7, c: int = 8) -> Tensor:
    return torch.randn(n, length, c, dtype=torch.float64) * 3 + 1


def drawn(layer: nn.Module) -> nn.Module:
    """The layer in float64, its parameters drawn at random."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double()


def same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# Against torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm_of_images_is_torchs_in_training_and_evaluation(dims: int) -> None:
    ours = drawn(BatchNorm()(8, "image"))
    theirs = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](8).double()
    theirs.load_state_dict(ours.state_dict())  # the names are torch's too
    for _ in range(3):
        x = torch.randn(4, 8, *[3, 4, 5][:dims], dtype=torch.float64)
        assert torch.equal(ours(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_batch_norm_of_sequences_is_torchs_of_all_steps() -> None:
    ours, theirs = BatchNorm()(8, "sequence").double(), nn.BatchNorm1d(8).double()
    x = sequences()
    same(ours(x), theirs(x.flatten(0, 1)).view_as(x))


def test_batch_norm_inside_a_recurrence_has_statistics_for_each_step() -> None:
    ours = BatchNorm(recurrent_gain=1.0).recurrent(8, "input", num_steps=7).double()
    x = sequences()
    steps = [nn.BatchNorm1d(8).double() for _ in range(7)]
    same(ours(x), torch.stack([norm(x[:, t]) for t, norm in enumerate(steps)], 1))
    same(ours.running_mean, torch.stack([norm.running_mean for norm in steps]))
    same(ours.running_var, torch.stack([norm.running_var for norm in steps]))
    same(ours.eval()(x), torch.stack([norm.eval()(x[:, t]) for t, norm in enumerate(steps)], 1))


def test_layer_norm_of_sequences_is_torchs() -> None:
    ours, theirs = drawn(LayerNorm()(8, "sequence")), nn.LayerNorm(8).double()
    theirs.load_state_dict(ours.state_dict())
    x = sequences()
    assert torch.equal(ours(x), theirs(x))


def test_layer_norm_of_images_over_the_whole_sample_and_at_each_pixel() -> None:
    x = images()
    same(LayerNorm()(8, "image").double()(x), F.layer_norm(x, x.shape[1:]))
    pixel = LayerNorm(image_scope="position")(8, "image").double()
    same(pixel(x), F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1))


def test_rms_norm_of_sequences_and_heads_is_torchs() -> None:
    ours, theirs = drawn(RMSNorm()(8, "sequence")), nn.RMSNorm(8, eps=1e-5).double()
    theirs.load_state_dict(ours.state_dict())
    x = sequences()
    assert torch.equal(ours(x), theirs(x))
    heads = RMSNorm()(8, "heads").double()
    same(heads(x.unflatten(1, (7, 1))), F.rms_norm(x.unflatten(1, (7, 1)), (8,), eps=1e-5))


def test_rms_norm_of_images_over_the_whole_sample_and_at_each_pixel() -> None:
    x = images()
    same(RMSNorm()(8, "image").double()(x), F.rms_norm(x, x.shape[1:], eps=1e-5))
    pixel = RMSNorm(image_scope="position")(8, "image").double()
    same(pixel(x), F.rms_norm(x.movedim(1, -1), (8,), eps=1e-5).movedim(-1, 1))


def test_instance_norm_is_torchs() -> None:
    x = images()
    same(InstanceNorm()(8, "image").double()(x), nn.InstanceNorm2d(8)(x))
    x = sequences()
    same(InstanceNorm()(8, "sequence").double()(x), F.instance_norm(x.transpose(1, 2)).transpose(1, 2))


def test_group_norm_is_torchs_with_the_features_where_the_layout_has_them() -> None:
    ours, theirs = drawn(GroupNorm(num_groups=4)(8, "image")), nn.GroupNorm(4, 8).double()
    theirs.load_state_dict(ours.state_dict())
    x = images()
    assert torch.equal(ours(x), theirs(x))
    x = sequences()
    expected = F.group_norm(x.transpose(1, 2), 4).transpose(1, 2)
    same(GroupNorm(num_groups=4)(8, "sequence").double()(x), expected)
    each = F.group_norm(x.flatten(0, 1), 4).view_as(x)
    same(GroupNorm(num_groups=4, sequence_scope="position")(8, "sequence").double()(x), each)


def test_norms_of_vectors_are_torchs() -> None:
    x = torch.randn(6, 8, dtype=torch.float64) * 3 + 1
    pairs: list[tuple[Norm, nn.Module]] = [
        (LayerNorm(), nn.LayerNorm(8)),
        (LayerNorm(sequence_scope="sample"), nn.LayerNorm(8)),
        (RMSNorm(), nn.RMSNorm(8, eps=1e-5)),
        (GroupNorm(num_groups=4), nn.GroupNorm(4, 8)),
        (GroupNorm(num_groups=1), nn.GroupNorm(1, 8)),
    ]
    for norm, theirs in pairs:
        ours = drawn(norm(8, "vector"))
        theirs.double().load_state_dict(ours.state_dict())
        same(ours(x), theirs(x))


def test_batch_norm_of_vectors_is_torchs_in_training_and_evaluation() -> None:
    ours, theirs = drawn(BatchNorm()(8, "vector")), nn.BatchNorm1d(8).double()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(4, 8, dtype=torch.float64) * 3 + 1
        assert torch.equal(ours(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), buffer)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


# Identities -------------------------------------------------------------------------------------------------------


def test_group_norm_at_its_two_ends_is_layer_norm_and_instance_norm() -> None:
    for x, layout in ((images(), "image"), (sequences(), "sequence")):
        one = GroupNorm(num_groups=1)(8, layout).double()(x)
        same(one, LayerNorm(sequence_scope="sample")(8, layout).double()(x))
        each = GroupNorm(num_groups=8)(8, layout).double()(x)
        same(each, InstanceNorm()(8, layout).double()(x))


def test_groups_by_their_size_are_groups_by_their_number() -> None:
    x = images()
    by_size = GroupNorm(num_groups=None, group_size=2)(8, "image").double()
    same(by_size(x), GroupNorm(num_groups=4)(8, "image").double()(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"ghost_batch_size": 4},
        {"ghost_batch_size": 100},
        {"r_max": 3.0, "d_max": 5.0, "renorm_start": 9, "renorm_end": 9},
        {"r_max": 1.0, "d_max": 0.0},
        {"sync": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["image", "sequence", "vector", "recurrence"])
def test_settings_of_batch_norm_at_their_limits_are_batch_norm(settings: dict[str, float], layout: str) -> None:
    def make(norm: Norm) -> nn.Module:
        layer = norm.recurrent(8, "cell", num_steps=7) if layout == "recurrence" else norm(8, layout)
        return layer.double()

    ours, plain = make(BatchNorm(**settings)), make(BatchNorm())
    for _ in range(3):
        x = {"image": images, "vector": lambda: images().flatten(1)[:, :8]}.get(layout, sequences)()
        same(ours(x), plain(x))
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# Against the papers' formulas -------------------------------------------------------------------------------------


def test_filter_response_norm_is_the_papers() -> None:
    layer = drawn(FilterResponseNorm()(8, "image", activation=nn.ReLU()))
    x = images()
    nu2 = x.square().mean((2, 3), keepdim=True)
    gamma, beta, tau = (p.view(-1, 1, 1) for p in (layer.weight, layer.bias, layer.tau))
    same(layer(x), torch.maximum(gamma * x / torch.sqrt(nu2 + 1e-6) + beta, tau))
    bare = FilterResponseNorm()(8, "image").double()
    same(bare(x), x / torch.sqrt(nu2 + 1e-6))


def test_evonorm_s0_is_the_papers() -> None:
    layer = drawn(EvoNormS0(num_groups=4)(8, "image", activation=nn.ReLU()))
    x = images()
    std = torch.sqrt(x.unflatten(1, (4, 2)).var((2, 3, 4), correction=0, keepdim=True) + 1e-5)
    std = std.expand(4, 4, 2, 5, 6).flatten(1, 2)
    gamma, beta, v = (p.view(-1, 1, 1) for p in (layer.weight, layer.bias, layer.v))
    same(layer(x), x * torch.sigmoid(v * x) / std * gamma + beta)
    same(EvoNormS0(num_groups=4)(8, "image").double()(x), x / std)


def test_evonorm_b0_is_the_papers_and_evaluates_by_its_running_variance() -> None:
    layer = drawn(EvoNormB0()(8, "image", activation=nn.ReLU()))
    gamma, beta, v = (p.view(-1, 1, 1) for p in (layer.weight, layer.bias, layer.v))

    def formula(x: Tensor, var: Tensor) -> Tensor:
        own = torch.sqrt(x.var((2, 3), correction=0, keepdim=True) + 1e-5)
        return x / torch.maximum(torch.sqrt(var + 1e-5), v * x + own) * gamma + beta

    x = images()
    same(layer(x), formula(x, x.var((0, 2, 3), correction=0, keepdim=True)))
    running = 0.9 + 0.1 * x.var((0, 2, 3), keepdim=True)
    same(layer.eval()(x), formula(x, running))
    bare = EvoNormB0()(8, "image").double()
    same(bare(x), x / torch.sqrt(x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5))


def test_dynamic_tanh_is_the_papers() -> None:
    layer = drawn(DyT()(8, "sequence"))
    x = sequences()
    same(layer(x), torch.tanh(layer.alpha * x) * layer.weight + layer.bias)
    assert DyT(alpha=0.7)(8, "image").alpha.item() == pytest.approx(0.7)
