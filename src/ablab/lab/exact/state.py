"""Training state outside of parameters and buffers: metrics and plain attributes of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

# Metrics --------------------------------------------------------------------------------------------------------------


def metrics_of(module: nn.Module) -> dict[str, Metric]:
    """Return all metrics of a module, including those in collections, by name."""
    for child in module.modules():
        if isinstance(child, MetricCollection):
            child.items()  # separates the states of metrics in a compute group
    return {name: child for name, child in module.named_modules() if isinstance(child, Metric)}


# Attributes -----------------------------------------------------------------------------------------------------------

# Attributes of every nn.Module and LightningModule.
OWN_ATTRIBUTES = {*vars(nn.Module()), *vars(L.LightningModule())}


def iter_attributes(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Yield the attributes of a module and its children that are tensors or plain data: module, name, value.

    Parameters, buffers and metrics are saved elsewhere. Attributes may carry state from step to step: the hidden state
    of a recurrent network, a counter, a running mean.
    """
    for name, child in module.named_modules():
        if not isinstance(child, Metric | MetricCollection):
            for key, value in vars(child).items():
                if key not in OWN_ATTRIBUTES and is_plain(value):
                    yield name, key, value


def version_marks(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Return marks that detect changes of plain attributes, without copying them."""
    return {(name, key): version_mark(value) for name, key, value in iter_attributes(module)}


def changed_attributes(module: nn.Module, before: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    """Return the plain attributes that have changed, by module name, on the CPU."""
    found: dict[str, dict[str, Any]] = {}
    for name, key, value in iter_attributes(module):
        if (name, key) not in before or not is_same_version(version_mark(value), before[name, key]):
            found.setdefault(name, {})[key] = detach_to_cpu(value)
    return found


def restore_attributes(module: nn.Module, saved: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
    """Restore saved attributes, with their tensors on a device."""
    modules = dict(module.named_modules())
    for name, own in saved.items():
        for key, value in own.items():
            if name in modules:
                setattr(modules[name], key, to_device(value, device))


def is_plain(value: Any) -> bool:
    """Return whether a value consists of tensors and plain data."""
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    if isinstance(value, Mapping):
        return (
            type(value) is dict
            and all(isinstance(key, str | int) for key in value)
            and all(map(is_plain, value.values()))
        )
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes)


def version_mark(value: Any) -> Any:
    """Return a value with the versions of its tensors, which change on in-place writes."""
    if isinstance(value, Tensor):
        return (value, value._version)
    if isinstance(value, Mapping):
        return {key: version_mark(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [type(value), *map(version_mark, value)]
    return value


def is_same_version(a: Any, b: Any) -> bool:
    """Return whether two marks belong to the same value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_same_version(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same_version, a, b))
    return bool(a == b)


def detach_to_cpu(value: Any) -> Any:
    """Return a copy of plain data with detached tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: detach_to_cpu(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(detach_to_cpu, value))
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """Return plain data with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return value
