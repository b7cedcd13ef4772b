"""What the mathematics of a step needs, and what a device can do."""

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

PEAK_SECONDS = 0.2
PEAK_SIZE = {"cpu": 1024}  # of the square matrices; 8192 on accelerators


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: of a forward and backward pass, of the forward pass alone, and that by modules."""

    step: int
    forward: int
    modules: dict[str, int]


def flops_of(model: nn.Module, batch: Batch) -> Flops:
    """What a step on a batch needs, counted on the meta device: nothing is computed, and the model stays as it is.

    Matrix products, convolutions and attention are counted; a multiplication and an addition are two operations.

    Raises:
        ValueError: the model cannot be counted.
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
    modules = {name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name in names_of_parts(model)}
    return Flops(counter.get_total_flops(), forward, {name: number for name, number in modules.items() if number})


def names_of_parts(model: nn.Module) -> list[str]:
    """The model's own modules; of those that only hold others, these."""
    names = []
    for name, child in model.named_children():
        holds = isinstance(child, nn.Sequential | nn.ModuleList)
        names += [f"{name}.{inner}" for inner, _ in child.named_children()] if holds else [name]
    return names


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here and now, the fastest of several."""
    size = PEAK_SIZE.get(device.type, 8192)
    own = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=own, device=device).to(dtype) for _ in range(2))

    def product() -> float:
        began = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        return time.perf_counter() - began

    with torch.no_grad():
        product()  # the first one loads what the others have
        until, fastest = time.perf_counter() + PEAK_SECONDS, math.inf
        while fastest == math.inf or time.perf_counter() < until:
            fastest = min(fastest, product())
    return 2 * size**3 / fastest


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
