"""Save and restore the state of metrics, for checkpoints within an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

Metrics = MetricCollection | Mapping[str, Metric]


def metric_states(metrics: Metrics) -> dict[str, Any]:
    """Return the metrics' states in this process, on the CPU."""
    return {
        name: {
            "updates": metric.update_count,
            "state": {key: to_cpu(value) for key, value in metric.metric_state.items()},
        }
        for name, metric in metrics.items()
    }


def restore_metrics(metrics: Metrics, saved: list[dict[str, Any]], *, rank: int, world_size: int) -> None:
    """Restore metrics from the states of all processes.

    If the world size has changed, rank 0 gets the combined states, and the other ranks start from zero.

    Args:
        metrics: the metrics of this process.
        saved: the saved states, by rank.
        rank, world_size: rank of this process, and current number of processes.
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


def gather_objects(here: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of all processes, by rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [here]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    return everywhere


def to_cpu(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [v.detach().cpu().clone() for v in value] if isinstance(value, list) else value.detach().cpu().clone()
