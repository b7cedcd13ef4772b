"""What batch norm can be set to: ghost batches, renorm, mean-only, frozen, masks of few values, precise statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.norms import BatchNorm, EvoNormB0, recalibrate


def images(n: int = 6, c: int = 4) -> Tensor:
    return torch.randn(n, c, 3, 5, dtype=torch.float64) * 3 + 1


def same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_ghost_batches_are_normalized_apart_and_averaged_one_after_another() -> None:
    ghost, plain = BatchNorm(ghost_batch_size=4)(4, "image").double(), BatchNorm()(4, "image").double()
    x = images(10)
    parts = [plain(part) for part in x.split(4)]  # the last has two samples
    same(ghost(x), torch.cat(parts))
    same(ghost.running_mean, plain.running_mean)
    same(ghost.running_var, plain.running_var)
    same(ghost.eval()(x), plain.eval()(x))  # evaluation knows no ghosts


def test_mean_only_subtracts_the_mean_and_learns_a_shift_alone() -> None:
    layer = BatchNorm(mean_only=True)(4, "image").double()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    nn.init.normal_(layer.bias)
    x = images()
    mean = x.mean((0, 2, 3), keepdim=True)
    same(layer(x), x - mean + layer.bias.view(-1, 1, 1))
    same(layer.eval()(x), x - 0.1 * mean + layer.bias.view(-1, 1, 1))


def test_renorm_corrects_the_batch_towards_the_running_averages_within_bounds() -> None:
    layer = BatchNorm(r_max=1.5, d_max=0.5)(4, "image").double()
    layer.running_mean.copy_(torch.tensor([1.0, 0.0, -2.0, 30.0]))
    layer.running_var.copy_(torch.tensor([9.0, 1.0, 4.0, 100.0]))
    x = images()
    mean = x.mean((0, 2, 3))
    std = torch.sqrt(x.var((0, 2, 3), correction=0) + 1e-5)
    running = torch.sqrt(layer.running_var + 1e-5)
    r = (std / running).clamp(1 / 1.5, 1.5)
    d = ((mean - layer.running_mean) / running).clamp(-0.5, 0.5)
    r, d = r.view(-1, 1, 1), d.view(-1, 1, 1)  # constants to the gradient

    def formula(x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * r + d

    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), formula(theirs)
    same(y, expected)
    weights = torch.randn_like(x)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    same(ours.grad, theirs.grad)


def test_renorm_without_bounds_trains_as_it_evaluates() -> None:
    layer = BatchNorm(r_max=1e6, d_max=1e6)(4, "image").double()
    evaluated = copy.deepcopy(layer).eval()
    x = images()
    same(layer(x), evaluated(x))


def test_renorms_bounds_grow_between_its_steps() -> None:
    layer = BatchNorm(r_max=3.0, d_max=5.0, renorm_start=2, renorm_end=4)(4, "image").double()
    far = (torch.tensor(-1e6, dtype=torch.float64), torch.tensor(1e-8, dtype=torch.float64))
    bounds = []
    for _ in range(6):
        layer(images())
        r, d = layer.renorm_correction(torch.tensor(0.0).double(), torch.tensor(1.0).double(), *far)
        bounds.append((r.item(), d.item()))
    assert bounds == [(1, 0), (1, 0), (2, 2.5), (3, 5), (3, 5), (3, 5)]


def test_frozen_normalizes_by_what_is_stored_and_learns_nothing() -> None:
    layer = BatchNorm(frozen=True)(4, "image").double()
    layer.running_mean.copy_(torch.randn(4))
    layer.running_var.copy_(torch.rand(4) + 0.5)
    before = copy.deepcopy(layer.state_dict())
    x = images()
    expected = nn.functional.batch_norm(x, layer.running_mean, layer.running_var)
    same(layer(x), expected)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    BatchNorm(frozen=True).zero_init(layer, nn.Conv2d(3, 4, 1))  # a gain that is not learned would stay zero for ever
    assert layer.weight.min() == 1


def test_torchs_own_checkpoints_load() -> None:
    layer = BatchNorm()(4, "image")
    layer.load_state_dict(nn.BatchNorm2d(4).state_dict())


def test_a_step_that_one_sequence_alone_reaches_is_normalized_by_the_running_averages() -> None:
    layer = BatchNorm(recurrent_gain=1.0).recurrent(4, "cell", num_steps=3).double()
    layer.running_mean.copy_(torch.randn(3, 4))
    layer.running_var.copy_(torch.rand(3, 4) + 0.5)
    before = copy.deepcopy(layer)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    valid = torch.arange(3) < torch.tensor([1, 2, 2, 3, 2])[:, None]
    y = layer(x, valid)
    same(y[3, 2], before.eval()(x)[3, 2])
    assert torch.equal(layer.running_mean[2], before.running_mean[2])
    assert not torch.equal(layer.running_mean[1], before.running_mean[1])


@pytest.mark.parametrize("settings", [{}, {"sync": True}, {"ghost_batch_size": 2}, {"mean_only": True}, {"r_max": 2.0}])
def test_what_the_norm_sees_of_a_batch(settings: dict[str, Any]) -> None:
    expected = {(): 8, ("sync",): 32, ("ghost_batch_size",): 2, ("mean_only",): 8, ("r_max",): 8}[tuple(settings)]
    assert BatchNorm(**settings).normalization_batch_size(8, 4) == expected
    assert BatchNorm(ghost_batch_size=16).normalization_batch_size(8, 4) == 8
    assert BatchNorm(frozen=True).normalization_batch_size(8, 4) == 1


# Precise statistics -----------------------------------------------------------------------------------------------


def test_recalibrated_averages_are_those_of_all_batches_as_one() -> None:
    for norm in (BatchNorm(), BatchNorm(mean_only=True), EvoNormB0(), BatchNorm(ghost_batch_size=2)):
        layer = norm(4, "image").double()
        layer(images())
        batches = [images(3), images(5), images(2)]
        assert recalibrate(layer, batches) == 1
        joined = torch.cat(batches)
        same(layer.running_mean, joined.mean((0, 2, 3)))
        same(layer.running_var, joined.var((0, 2, 3)))
        assert layer.num_batches_tracked == 1
        assert layer.training


def test_recalibration_pools_each_step_of_a_recurrence_over_its_valid_values() -> None:
    layer = BatchNorm().recurrent(4, "cell", num_steps=3).double()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    valid = torch.arange(3) < torch.tensor([1, 2, 3, 3, 2, 3])[:, None]
    recalibrate(layer, [(x[:4], valid[:4]), (x[4:], valid[4:])], lambda batch: layer(*batch))
    for step in range(3):
        same(layer.running_mean[step], x[valid[:, step], step].mean(0))
        same(layer.running_var[step], x[valid[:, step], step].var(0))


def test_recalibration_does_not_depend_on_the_order_of_the_batches() -> None:
    for norm in (BatchNorm(), BatchNorm(r_max=3, d_max=5)):
        model = nn.Sequential(norm(4, "image"), nn.Conv2d(4, 4, 1), norm(4, "image")).double()
        model(images())
        batches = [images(3), images(5), images(2)]
        other = copy.deepcopy(model)
        recalibrate(model, batches)
        recalibrate(other, [*reversed(batches)])
        for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
            same(ours.double(), theirs.double())


def test_recalibration_keeps_the_averages_of_steps_that_it_hardly_saw() -> None:
    layer = BatchNorm().recurrent(4, "cell", num_steps=4).double()
    layer(torch.randn(5, 4, 4, dtype=torch.float64))
    before = copy.deepcopy(layer)
    valid = torch.arange(4) < torch.tensor([2, 2, 3])[:, None]
    recalibrate(layer, [(torch.randn(3, 4, 4, dtype=torch.float64), valid)], lambda batch: layer(*batch))
    for name in layer.buffer_names:
        assert torch.equal(getattr(layer, name)[2:], getattr(before, name)[2:])
        assert not torch.equal(getattr(layer, name)[:2], getattr(before, name)[:2])


def test_forward_passes_with_and_without_a_mask_or_in_evaluation_share_a_backward_pass() -> None:
    layer = BatchNorm()(4, "sequence").double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    valid = torch.arange(5) < torch.tensor([2, 5, 3])[:, None]
    (layer(x).sum() + layer(x, valid).sum()).backward()
    evaluated = layer.eval()(x).square().sum()
    layer.train()(x, valid)
    evaluated.backward()


def test_recalibration_leaves_dropout_off_and_every_mode_and_weight_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm()(4, "image"), nn.Dropout(0.5)).double()
    model[2].eval()
    before = {name: value.clone() for name, value in model.named_parameters()}
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda module, arguments, output: seen.append((output == arguments[0]).all()))
    recalibrate(model, [images()])
    assert all(seen)
    assert model.training
    assert not model[2].training
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_recalibration_without_batches_or_that_breaks_off_changes_nothing() -> None:
    layer = BatchNorm()(4, "image").double()
    layer(images())
    before = copy.deepcopy(layer.state_dict())

    def broken() -> Any:
        yield images()
        raise RuntimeError("the disk is gone")

    with pytest.raises(ValueError, match="no batches to take the statistics of; give at least one"):
        recalibrate(layer, [])
    with pytest.raises(RuntimeError, match="the disk is gone"):
        recalibrate(layer, broken())
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert layer.pooled is None


def test_a_model_without_batch_norm_has_nothing_to_recalibrate() -> None:
    assert recalibrate(nn.Linear(3, 3), []) == 0
    assert recalibrate(BatchNorm(frozen=True)(4, "image"), []) == 0
