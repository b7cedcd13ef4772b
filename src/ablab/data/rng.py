"""Counter-based random numbers per sample, independent of workers, processes and resumed runs."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

# Constants of SplitMix64 as signed 64-bit integers, since torch has no unsigned arithmetic.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def sample_seeds(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Return a seed for each sample of an epoch, as a function of (seed, epoch, index).

    Shape:
        indices `(N)` -> `(N)`, int64
    """
    return epoch_seeds(index_seeds(seed, indices), torch.tensor(epoch, device=indices.device))


def index_seeds(seed: int, indices: Tensor) -> Tensor:
    """Return a seed for each sample, the same in every epoch."""
    return splitmix64(indices + int(splitmix64(torch.tensor(seed))))


def epoch_seeds(seeds: Tensor, epoch: Tensor) -> Tensor:
    """Derive the seeds of an epoch from the samples' seeds."""
    return splitmix64(seeds + epoch * 1_000_000_007)


def view_seeds(seeds: Tensor, view: int) -> Tensor:
    """Derive the seeds of one of several views; the first view has the seeds of the samples."""
    return splitmix64(seeds + view * 1_000_000_009) if view else seeds


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global random generators from the run's seed, a step and a rank."""
    seed_generators(int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8]))


def seed_generators(seed: int) -> None:
    """Seed the global random generators of torch, NumPy and Python with a 64-bit integer."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow: it queries all backends
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (third-party code uses it)
    random.seed(seed)


def uniform(seeds: Tensor, stream: int | Tensor) -> Tensor:
    """Return a uniform number in [0, 1) for each seed; each use should have its own `stream`.

    A tensor of streams, broadcast against the seeds, draws from several streams in one call.

    Shape:
        seeds `(N)` -> `(N)`, float32
    """
    bits = splitmix64(seeds + (stream + 1) * 1_000_003)
    return shift_right(bits, 40).float() * 2.0**-24


def normal(seeds: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers of a given shape for each seed.

    Shape:
        seeds `(N)` -> `(N, *shape)`, float32
    """
    size = torch.Size(shape).numel()
    each = splitmix64(seeds[:, None] + (stream + 1) * 1_000_003) + torch.arange(size, device=seeds.device)
    radius = (-2 * (1 - uniform(each, 0)).log()).sqrt()  # Box–Muller transform; 1 − u is never 0
    return (radius * (2 * torch.pi * uniform(each, 1)).cos()).view(len(seeds), *shape)


def make_generator(*numbers: int) -> torch.Generator:
    """Return a torch generator seeded by several integers."""
    key = torch.tensor(0)
    for number in numbers:
        key = splitmix64(key + number)
    return torch.Generator().manual_seed(int(key))


def splitmix64(x: Tensor) -> Tensor:
    """Hash 64-bit integers with SplitMix64, a bijection.

    References:
        Steele et al. 2014, https://doi.org/10.1145/2660193.2660195
    """
    x = x + GAMMA
    x = (x ^ shift_right(x, 30)) * FIRST
    x = (x ^ shift_right(x, 27)) * SECOND
    return x ^ shift_right(x, 31)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right logically; torch's operator is an arithmetic shift, which keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
