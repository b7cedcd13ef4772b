"""Pairs by seed: every cell begins from the same weights and sees the same samples in the same order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from ablab.lab.train import Parts, assemble

Compose = Callable[..., DictConfig]


def built(config: Compose, *words: str) -> Parts:
    parts = assemble(config("logger=csv", "trainer=cpu", *words))
    parts.data.setup("fit")
    return parts


def weights(parts: Parts) -> dict[str, Tensor]:
    """What was drawn: a norm's own gain and shift are 1 and 0 everywhere."""
    return {name: value for name, value in parts.task.model.named_parameters() if value.dim() > 1}


def samples(parts: Parts, num_batches: int, epoch: int = 0) -> Tensor:
    """The inputs of an epoch's first batches, one after another."""
    loader = parts.data.train_dataloader()
    loader.sampler.epoch = epoch
    batches = [batch.inputs for batch, _ in zip(loader, range(num_batches), strict=False)]
    return torch.cat(batches)


@pytest.mark.parametrize("norm", ["none", "batchnorm", "instancenorm", "layernorm", "frn", "evonorm_s0"])
def test_levels_of_a_norm_begin_from_the_same_weights_and_see_the_same_samples(config: Compose, norm: str) -> None:
    one, other = built(config, "norm=groupnorm", "seed=3"), built(config, f"norm={norm}", "seed=3")
    first, second = weights(one), weights(other)
    shared = first.keys() & second.keys()
    if norm == "none":  # without a norm whose gain could, a branch's last convolution starts it as zero
        shared -= {name for name in shared if ".convs.1." in name}
    assert len(shared) >= 5
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert torch.equal(samples(one, 3), samples(other, 3))
    assert torch.equal(samples(one, 3, epoch=2), samples(other, 3, epoch=2))


def test_levels_of_the_batch_size_see_the_same_samples_in_the_same_order(config: Compose) -> None:
    small, large = built(config, "data.batch_size=8", "seed=1"), built(config, "data.batch_size=32", "seed=1")
    assert torch.equal(samples(small, 8), samples(large, 2))
    assert torch.equal(weights(small)["head.weight"], weights(large)["head.weight"])


def test_levels_of_the_depth_share_the_weights_up_to_the_first_layer_that_differs(
    config: Compose,
) -> None:
    shallow, deep = weights(built(config, "model.depth=8")), weights(built(config, "model.depth=14"))
    shared = ["conv1.weight", "blocks.0.convs.0.weight", "blocks.0.convs.1.weight"]
    assert all(torch.equal(shallow[name], deep[name]) for name in shared)
    assert torch.equal(samples(built(config, "model.depth=8"), 2), samples(built(config, "model.depth=14"), 2))


@pytest.mark.parametrize("model", ["rnn", "transformer"])
def test_sequence_models_are_paired_too(config: Compose, model: str) -> None:
    words = [f"model={model}", "model.dropout=0.1", "seed=2"]
    one, other = built(config, *words, "norm=layernorm"), built(config, *words, "norm=batchnorm")
    first, second = weights(one), weights(other)
    shared = [name for name in first.keys() & second.keys() if first[name].shape == second[name].shape]
    assert len(shared) >= 3
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert torch.equal(samples(one, 3), samples(other, 3))


def test_another_seed_is_another_pair(config: Compose) -> None:
    one, other = built(config, "seed=0"), built(config, "seed=1")
    assert not torch.equal(weights(one)["head.weight"], weights(other)["head.weight"])
    assert not torch.equal(samples(one, 1), samples(other, 1))
