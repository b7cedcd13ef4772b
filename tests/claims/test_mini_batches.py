"""Claims M1 and M2: the mini-batch gradient is unbiased, not so with batch norm; its variance falls with the size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ablab.data.batch import Batch
from ablab.models.resnet import ResNet
from ablab.models.rnn import RNN
from ablab.models.transformer import Transformer
from ablab.norms import BatchNorm, GroupNorm, LayerNorm, NoNorm, Norm, WeightNorm

SIZES = [1, 2, 4, 8, 16]
Problem = tuple[nn.Module, Batch]


def problem(batch: Callable[..., Any], kind: str, norm: Norm) -> Problem:
    """A model in float64 at random weights, and real samples."""
    data, sizes = batch(kind, 16)
    model: nn.Module
    if kind == "images":
        model = ResNet(**sizes, norm=norm, depth=8, width=8, zero_init_residual=False)
    elif kind == "sequences":
        model = Transformer(**sizes, norm=norm, embed_dim=16, num_heads=2, num_layers=1)
    else:
        model = RNN(**sizes, norm=norm, hidden_size=16)
    inputs = data.inputs.double() if data.inputs.is_floating_point() else data.inputs
    return model.double(), data._replace(inputs=inputs, seeds=None)


def gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def relative_bias(model: nn.Module, data: Batch, size: int, order: Tensor) -> float:
    """How far the mean over the mini-batches of a partition is from the full gradient, over the latter's length."""
    full = gradient(model, data.inputs, data.targets)
    parts = order.split(size)
    mean = sum(gradient(model, data.inputs[part], data.targets[part]) for part in parts) / len(parts)
    assert isinstance(mean, Tensor)
    return float((mean - full).norm() / full.norm())


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        ("images", GroupNorm(num_groups=4)),
        ("images", NoNorm(weight=WeightNorm())),
        ("sequences", LayerNorm()),
        ("text", LayerNorm()),
    ],
)
def test_the_mean_over_a_partitions_batches_is_the_full_gradient(
    batch: Callable[..., Any], kind: str, norm: Norm
) -> None:
    model, data = problem(batch, kind, norm)

    @settings(max_examples=10)
    @given(size=st.sampled_from(SIZES), order=st.permutations(range(16)))
    def of_any_partition(size: int, order: list[int]) -> None:
        assert relative_bias(model, data, size, torch.tensor(order)) < 1e-12

    of_any_partition()


def test_with_batch_norm_it_is_not_and_the_less_the_smaller_the_batch(batch: Callable[..., Any]) -> None:
    model, data = problem(batch, "images", BatchNorm())
    order = torch.randperm(16)
    biases = {size: relative_bias(model, data, size, order) for size in SIZES[1:]}
    assert biases[16] < 1e-12
    assert biases[2] > biases[4] > biases[8] > 0.01


def test_the_variance_falls_with_the_batch_size_and_is_none_of_the_full_batch(batch: Callable[..., Any]) -> None:
    """Of all mini-batches of b of N samples: (1/b) (N - b)/(N - 1) of one sample's (Cochran 1977, theorem 2.2)."""
    model, data = problem(batch, "images", GroupNorm(num_groups=4))
    num = 6
    full = gradient(model, data.inputs[:num], data.targets[:num])
    variance = {}
    for size in range(1, num + 1):
        subsets = [list(subset) for subset in itertools.combinations(range(num), size)]
        errors = [gradient(model, data.inputs[s], data.targets[s]) - full for s in subsets]
        variance[size] = float(sum(error.square().sum() for error in errors)) / len(subsets)
    for size in range(1, num + 1):
        assert variance[size] == pytest.approx(variance[1] / size * (num - size) / (num - 1), rel=1e-10, abs=1e-20)
