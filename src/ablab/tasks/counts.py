"""What metrics have counted so far, as plain data: a checkpoint keeps it for the epoch that it interrupts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Metrics = MetricCollection | Mapping[str, Metric]


def counts(metrics: Metrics) -> dict[str, Any]:
    """The states of metrics in this process, on the CPU."""
    return {
        name: {
            "updates": metric.update_count,
            "state": {key: on_cpu(value) for key, value in metric.metric_state.items()},
        }
        for name, metric in metrics.items()
    }


def restore(metrics: Metrics, saved: list[dict[str, Any]], *, rank: int, world_size: int) -> None:
    """Have metrics go on from what each process had counted.

    Of another number of processes, the first one goes on from what all had counted together, the others from nothing.

    Args:
        metrics: those of this process.
        saved: the counts of each process there was.
        rank, world_size: this process, of how many there are now.
    """
    for name, metric in metrics.items():
        metric.reset()
        metric._update_count = max(process[name]["updates"] for process in saved)
        for key, combine in metric._reductions.items():
            values = [process[name]["state"][key] for process in saved]
            if len(saved) == world_size:
                value = values[rank]
            elif rank > 0:
                continue
            elif isinstance(values[0], list):
                value = [tensor for process in values for tensor in process]
            else:
                assert callable(combine), f"{key} of {type(metric).__name__} cannot be combined"
                value = combine(torch.stack(values))
            here = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
            setattr(metric, key, here)


def gathered(here: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process has, in their order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [here]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return everywhere


def on_cpu(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [v.detach().cpu().clone() for v in value] if isinstance(value, list) else value.detach().cpu().clone()
