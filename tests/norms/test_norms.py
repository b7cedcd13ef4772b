"""The norm layers against torch, against each other, and against what they promise about padding and causality."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ablab.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, NoNorm, Norm, Refused, WeightNorm

ACTIVATION_NORMS = [BatchNorm(), LayerNorm(), GroupNorm(num_groups=4), InstanceNorm(), NoNorm()]


def images(n: int = 4, c: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, c, 5, 6, dtype=dtype) * 3 + 1


def sequences(n: int = 4, length: int = 7, c: int = 8) -> Tensor:
    return torch.randn(n, length, c) * 3 + 1


def randomize(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_batch_norm_of_images_is_torchs_in_training_and_evaluation() -> None:
    ours, theirs = randomize(BatchNorm()(8, "image")), nn.BatchNorm2d(8)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        x = images()
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0, atol=0)
    x = images()
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


def test_batch_norm_of_sequences_is_torchs_of_all_steps() -> None:
    ours, theirs = BatchNorm()(8, "sequence"), nn.BatchNorm1d(8)
    x = sequences()
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))


def test_batch_norm_inside_a_recurrence_has_statistics_for_each_step() -> None:
    ours = BatchNorm(recurrent_gain=1.0).recurrent(8, "input", num_steps=7)
    x = sequences()
    steps = [nn.BatchNorm1d(8) for _ in range(7)]
    expected = torch.stack([norm(x[:, t]) for t, norm in enumerate(steps)], 1)
    torch.testing.assert_close(ours(x), expected)
    one_by_one = BatchNorm(recurrent_gain=1.0).recurrent(8, "input", num_steps=7)
    torch.testing.assert_close(torch.stack([one_by_one(x[:, t], step=t) for t in range(7)], 1), expected)
    for layer in (ours, one_by_one):
        torch.testing.assert_close(layer.running_mean, torch.stack([norm.running_mean for norm in steps]))
        torch.testing.assert_close(layer.running_var, torch.stack([norm.running_var for norm in steps]))


def test_layer_norm_of_sequences_is_torchs() -> None:
    ours, theirs = randomize(LayerNorm()(8, "sequence")), nn.LayerNorm(8)
    theirs.load_state_dict(ours.state_dict())
    x = sequences()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_layer_norm_of_images_over_the_whole_sample_and_at_each_pixel() -> None:
    x = images()
    whole = LayerNorm()(8, "image")(x)
    torch.testing.assert_close(whole, F.layer_norm(x, x.shape[1:]), rtol=1e-4, atol=1e-5)
    pixel = LayerNorm(image_scope="position")(8, "image")(x)
    torch.testing.assert_close(pixel, F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1), rtol=1e-4, atol=1e-5)


def test_group_norm_at_its_two_ends_is_layer_norm_and_instance_norm() -> None:
    x = images()
    torch.testing.assert_close(GroupNorm(num_groups=1)(8, "image")(x), LayerNorm()(8, "image")(x))
    torch.testing.assert_close(GroupNorm(num_groups=8)(8, "image")(x), InstanceNorm()(8, "image")(x))
    torch.testing.assert_close(InstanceNorm()(8, "image")(x), nn.InstanceNorm2d(8)(x), rtol=1e-4, atol=1e-5)


def test_group_norm_of_sequences_is_torchs_with_steps_last() -> None:
    x = sequences()
    expected = F.group_norm(x.transpose(1, 2), 4).transpose(1, 2)
    torch.testing.assert_close(GroupNorm(num_groups=4)(8, "sequence")(x), expected)
    each = F.group_norm(x.flatten(0, 1), 4).view_as(x)
    torch.testing.assert_close(GroupNorm(num_groups=4, sequence_scope="position")(8, "sequence")(x), each)


@pytest.mark.parametrize("norm", ACTIVATION_NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("layout", ["image", "sequence"])
def test_every_layer_keeps_shape_and_dtype_and_has_finite_gradients(norm: Norm, layout: str) -> None:
    layer = norm(8, layout)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = (images() if layout == "image" else sequences()).to(dtype).requires_grad_()
        y = copy.deepcopy(layer).to(dtype)(x)
        assert y.shape == x.shape
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("norm", ACTIVATION_NORMS, ids=lambda norm: type(norm).__name__)
def test_a_square_sequence_is_normalized_over_the_declared_dimension(norm: Norm) -> None:
    x = torch.randn(4, 8, 8)  # L == C: torch's own norms would take the wrong axis in silence
    longer = torch.cat([x, torch.randn(4, 3, 8)], 1)
    layer, same = norm(8, "sequence"), norm(8, "sequence")
    if isinstance(norm, LayerNorm | NoNorm):  # each step on its own: more steps change nothing
        torch.testing.assert_close(layer(x), same(longer)[:, :8])
    else:  # statistics of each feature over its steps: swapping the steps only swaps the output
        order = torch.randperm(8)
        torch.testing.assert_close(layer(x)[:, order], same(x[:, order]))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=5), seed=st.integers(0, 100))
@pytest.mark.parametrize("norm", ACTIVATION_NORMS, ids=lambda norm: type(norm).__name__)
def test_padding_changes_no_valid_output_and_no_buffer(norm: Norm, lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), 7, 8, generator=generator)
    other = torch.where(valid[..., None], x, 1e4)
    first, second = norm(8, "sequence"), norm(8, "sequence")
    torch.testing.assert_close(first(x, valid)[valid], second(other, valid)[valid])
    longer = torch.cat([other, torch.full((len(lengths), 2, 8), float("nan"))], 1)
    third = norm(8, "sequence")
    more = torch.cat([valid, torch.zeros(len(lengths), 2, dtype=torch.bool)], 1)
    torch.testing.assert_close(first(x, valid)[valid], third(longer, more)[more])
    for a, b in zip(second.buffers(), third.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_mask_without_padding_changes_nothing() -> None:
    x, valid = sequences(), torch.ones(4, 7, dtype=torch.bool)
    for norm in ACTIVATION_NORMS:
        torch.testing.assert_close(norm(8, "sequence")(x, valid), norm(8, "sequence")(x), rtol=1e-4, atol=1e-5)


def test_weight_norm_changes_no_output_and_decouples_length_from_direction() -> None:
    linear = nn.Linear(5, 3)
    plain = copy.deepcopy(linear)
    wrapped = NoNorm(weight=WeightNorm()).wrap(linear)
    x = torch.randn(4, 5)
    torch.testing.assert_close(wrapped(x), plain(x))
    with torch.no_grad():
        wrapped.parametrizations.weight.original1.mul_(7)
    torch.testing.assert_close(wrapped(x), plain(x))
    copy.deepcopy(wrapped)


def test_weight_norm_of_a_transposed_convolution_has_a_length_for_each_output() -> None:
    wrapped = WeightNorm()(nn.ConvTranspose2d(4, 6, 3))
    assert wrapped.parametrizations.weight.original0.shape == (1, 6, 1, 1)


@pytest.mark.parametrize("weight", [None, WeightNorm()])
@pytest.mark.parametrize("make", [BatchNorm, LayerNorm, NoNorm])
def test_zero_init_makes_a_branch_zero_that_can_still_learn(make: type[Norm], weight: WeightNorm | None) -> None:
    norm = make(weight=weight)
    conv = norm.wrap(nn.Conv2d(3, 8, 3, bias=norm.needs_bias))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layer = norm(8, "image")
    norm.zero_init(layer, conv)
    y = layer(conv(torch.randn(2, 3, 6, 6)))
    assert y.abs().max() == 0
    (y - 1).square().sum().backward()
    gradients = [p.grad for p in [*layer.parameters(), *conv.parameters()] if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_a_norm_without_a_gain_is_left_alone_by_zero_init() -> None:
    norm = BatchNorm(affine=False)
    conv = nn.Conv2d(3, 8, 3)
    before = conv.weight.clone()
    norm.zero_init(norm(8, "image"), conv)
    assert torch.equal(conv.weight, before)


# What is refused, word for word -----------------------------------------------------------------------------------


def reason(layer: nn.Module) -> str:
    assert isinstance(layer, Refused)
    with pytest.raises(ValueError, match=re.escape(layer.reason)):
        layer(torch.zeros(1))
    return layer.reason


def test_groups_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    assert reason(GroupNorm(num_groups=32)(48, "image")) == (
        "num_groups=32 does not divide 48 features; divisors are 1 2 3 4 6 8 12 16 24 48; set norm.num_groups=24"
    )


def test_statistics_over_time_are_refused_in_causal_models() -> None:
    for norm in (BatchNorm(), GroupNorm(), InstanceNorm()):
        assert "would leak the future into a causal model" in reason(norm(8, "sequence", causal=True))
    for allowed in (LayerNorm(), NoNorm(), GroupNorm(num_groups=4, sequence_scope="position")):
        assert not isinstance(allowed(8, "sequence", causal=True), Refused)


def test_instance_norm_is_refused_inside_a_recurrence() -> None:
    assert reason(InstanceNorm().recurrent(8, "cell", num_steps=3)) == (
        "instance norm is not defined inside a recurrence: a single time step has one value for each feature, and the "
        "output would be a constant; choose norm=layernorm, groupnorm, batchnorm, weightnorm or none"
    )


def test_one_value_for_each_statistic_is_refused() -> None:
    with pytest.raises(ValueError, match="batch norm in training needs more than one value for each feature"):
        BatchNorm()(8, "image")(torch.randn(1, 8, 1, 1))
    with pytest.raises(ValueError, match="batch norm in training needs more than one value for each feature"):
        BatchNorm().recurrent(8, "cell", num_steps=3)(torch.randn(1, 8), step=0)
    with pytest.raises(ValueError, match="one value for each statistic"):
        InstanceNorm()(8, "image")(torch.randn(4, 8, 1, 1))
    assert "one value" in reason(GroupNorm(num_groups=8, sequence_scope="position")(8, "sequence"))


def test_features_in_another_dimension_are_refused() -> None:
    for norm in (BatchNorm(), LayerNorm(), InstanceNorm()):
        with pytest.raises(ValueError, match=r"a norm of 8 features got a tensor of shape \(4, 7, 5\)"):
            norm(8, "sequence")(torch.randn(4, 7, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchNorm(momentum=0), "momentum=0: a share of the newest batch"),
        (lambda: LayerNorm(eps=0), "eps=0: the variance needs something added"),
        (lambda: GroupNorm(num_groups=0), "num_groups=0: at least one group"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: type[Norm], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_weight_norm_of_a_weight_without_length_is_refused() -> None:
    linear = nn.Linear(3, 2)
    nn.init.zeros_(linear.weight)
    with pytest.raises(ValueError, match="a weight of length 0 has no direction"):
        WeightNorm()(linear)


def test_a_step_beyond_the_longest_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps statistics for 3 steps, and step 4 was asked for"):
        BatchNorm().recurrent(8, "input", num_steps=3)(torch.randn(2, 8), step=3)
