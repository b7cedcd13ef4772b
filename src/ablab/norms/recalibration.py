"""Precise batch norm: running averages replaced by the statistics of many batches with the final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ablab.norms.batch import BatchNormLayer, over_processes, world_size


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any], predict: Callable[[Any], Any] | None = None) -> int:
    """Give each batch norm the mean and variance of all values that it sees in `batches`, as if they were one batch.

    Each layer's input is what the layers before it make of it with the statistics of the same batch, as in training;
    dropout is off. Frozen layers and the mode of all modules stay as they are.

    Args:
        model: any of its modules may be batch norms of this package.
        batches: what the model is to see; under DDP every process gives its own.
        predict: passes one of them through the model; the model itself if None.

    Returns:
        How many layers got new statistics.

    Raises:
        ValueError: there were layers, but no batches.

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
            finish(layer, buffers)
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


def finish(layer: BatchNormLayer, before: dict[str, Tensor]) -> None:
    """Pool over processes, and keep the old averages where fewer than two values were seen."""
    count = layer.pooled
    assert count is not None
    if world_size() > 1 and not layer.norm.sync:  # synchronized statistics are everyone's already
        biased = layer.running_var * (count - 1).clamp(min=0) / count.clamp(min=1)
        mean, var, count = over_processes(layer.running_mean, biased, count)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var * count / (count - 1).clamp(min=1))
    for name in layer.buffer_names:
        averages = getattr(layer, name)
        averages.copy_(torch.where(count > 1, averages, before[name]))
