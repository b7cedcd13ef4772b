"""Floating-point operations of a training step, and peak throughput of a device."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ablab.data.batch import Batch

PEAK_SECONDS = 0.2  # duration of the peak measurement
PEAK_SIZE = {"cpu": 1024}  # size of its square matrices; 8192 on accelerators


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a step (forward and backward), the forward pass, and each module's forward pass."""

    step: int
    forward: int
    modules: dict[str, int]


def count_flops(model: nn.Module, batch: Batch) -> Flops:
    """Count the floating-point operations of a step on a batch, on the meta device, without changing the model.

    Counts matrix products, convolutions and attention; a multiply-add counts as two operations.

    Raises:
        ValueError: the model cannot be traced on the meta device, or is sharded.
    """
    state = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        if not isinstance(tensor, DTensor)
    }
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("each process has a part of every weight")
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    inputs = [tensor.to("meta") for tensor in (batch.inputs, batch.valid) if tensor is not None]
    inputs = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
    counter = FlopCounterMode(display=False)
    try:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad(), counter:
            outputs = functional_call(model, state, tuple(inputs))
            counts: Any = counter.get_flop_counts()
            forward = counter.get_total_flops()
            outputs.sum().backward()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    modules = {name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name in leaf_names(model)}
    return Flops(counter.get_total_flops(), forward, {name: number for name, number in modules.items() if number})


def leaf_names(model: nn.Module) -> list[str]:
    """Return the names of the model's children, with containers replaced by their items."""
    names = []
    for name, child in model.named_children():
        holds = isinstance(child, nn.Sequential | nn.ModuleList)
        names += [f"{name}.{inner}" for inner, _ in child.named_children()] if holds else [name]
    return names


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of a large matrix product, the best of several runs."""
    size = PEAK_SIZE.get(device.type, 8192)
    generator = torch.Generator(device).manual_seed(0)  # does not touch the global random state
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))

    def product() -> float:
        began = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        return time.perf_counter() - began

    with torch.no_grad():
        product()  # warm up
        until, fastest = time.perf_counter() + PEAK_SECONDS, math.inf
        while fastest == math.inf or time.perf_counter() < until:
            fastest = min(fastest, product())
    return 2 * size**3 / fastest


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
