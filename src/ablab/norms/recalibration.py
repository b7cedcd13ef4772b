"""Precise batch norm: replace running averages by the statistics of many batches under the final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ablab.norms.batch import BatchNormLayer, combine_moments, world_size


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], predict: Callable[[Any], Any] | None = None) -> int:
    """Set each batch norm's running averages to the exact mean and variance of all its inputs over `batches`.

    In the forward passes, layers normalize by the statistics of the current batch, as in training; dropout is off.
    Frozen layers and the train or eval mode of all modules are left unchanged.

    Args:
        model: a model that may contain this package's batch norm layers.
        batches: batches to compute the statistics on; under DDP, each process passes its own.
        predict: passes one batch through the model; None calls the model itself.

    Returns:
        The number of layers that were recalibrated.

    Raises:
        ValueError: the model has batch norm layers, but `batches` is empty.

    References:
        Wu & Johnson 2021, https://arxiv.org/abs/2105.07576
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNormLayer) and not m.norm.frozen]
    if not layers:
        return 0
    modes = {module: module.training for module in model.modules()}
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.pooled = torch.zeros_like(layer.running_mean)
    seen = 0
    try:
        for batch in batches:
            (predict or model)(batch)
            seen += 1
        if not seen:
            raise ValueError("no batches to take the statistics of; give at least one")
        for layer, buffers in zip(layers, before, strict=True):
            finalize(layer, buffers)
    except BaseException:
        for layer, buffers in zip(layers, before, strict=True):
            layer.load_state_dict(buffers, strict=False)
        raise
    finally:
        for layer in layers:
            layer.pooled = None
        for module, mode in modes.items():
            module.training = mode
    return len(layers)


def finalize(layer: BatchNormLayer, before: dict[str, Tensor]) -> None:
    """Pool the statistics over processes, and restore the old averages where fewer than two values were seen."""
    count = layer.pooled
    assert count is not None
    if world_size() > 1 and not layer.norm.sync:  # synchronized statistics are already pooled
        biased = layer.running_var * (count - 1).clamp(min=0) / count.clamp(min=1)
        mean, var, count = combine_moments(layer.running_mean, biased, count)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var * count / (count - 1).clamp(min=1))
    for name in layer.buffer_names:
        averages = getattr(layer, name)
        averages.copy_(torch.where(count > 1, averages, before[name]))
