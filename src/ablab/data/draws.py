"""Random numbers that belong to a sample, not to a moment: no worker, process or resume changes them."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

# The finalizer of SplitMix64, as signed 64-bit numbers: torch has no unsigned arithmetic.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def sample_seeds(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """A seed for each sample of an epoch, from (seed, epoch, index) alone.

    Shape:
        indices `(N)` -> `(N)` of 64-bit whole numbers
    """
    return in_epoch(own_seeds(seed, indices), torch.tensor(epoch, device=indices.device))


def own_seeds(seed: int, indices: Tensor) -> Tensor:
    """A seed for each sample, the same in every epoch."""
    return scramble(indices + int(scramble(torch.tensor(seed))))


def in_epoch(seeds: Tensor, epoch: Tensor) -> Tensor:
    """The samples' seeds of one epoch."""
    return scramble(seeds + epoch * 1_000_000_007)


def in_view(seeds: Tensor, view: int) -> Tensor:
    """Return the samples' seeds of one of several views; the first view has the samples' own."""
    return scramble(seeds + view * 1_000_000_009) if view else seeds


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for a training step of a process."""
    seed_generators(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8]))


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python with a number of 64 bits."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of accelerator, even missing ones
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (others' code draws from it)
    random.seed(seed)


def uniform(seeds: Tensor, stream: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), one for each seed; every use of randomness takes a `stream` of its own.

    Several streams at once, as a tensor that broadcasts against the seeds, take no more operations than one.

    Shape:
        seeds `(N)` -> `(N)`, float32
    """
    bits = scramble(seeds + (stream + 1) * 1_000_003)
    return shifted(bits, 40).float() * 2.0**-24


def normal(seeds: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of a shape for each seed.

    Shape:
        seeds `(N)` -> `(N, *shape)`, float32
    """
    size = torch.Size(shape).numel()
    each = scramble(seeds[:, None] + (stream + 1) * 1_000_003) + torch.arange(size, device=seeds.device)
    radius = (-2 * (1 - uniform(each, 0)).log()).sqrt()  # Box-Muller; 1 − u is never 0
    return (radius * (2 * torch.pi * uniform(each, 1)).cos()).view(len(seeds), *shape)


def generator(*numbers: int) -> torch.Generator:
    """Torch's own random numbers, from a seed that whole numbers decide together."""
    key = torch.tensor(0)
    for number in numbers:
        key = scramble(key + number)
    return torch.Generator().manual_seed(int(key))


def scramble(x: Tensor) -> Tensor:
    """A bijection of 64-bit numbers whose output looks random.

    References:
        Steele et al. 2014, https://doi.org/10.1145/2660193.2660195
    """
    x = x + GAMMA
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


def shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
