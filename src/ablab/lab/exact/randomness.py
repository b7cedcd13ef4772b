"""Seed the global generators from a key, so that their states need not be saved."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from ablab.data.rng import seed_generators


def derive_seed(*key: Any) -> int:
    """Derive a 63-bit seed from a key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) & (1 << 63) - 1


def seed_all(*key: Any) -> None:
    """Seed the global generators of torch, NumPy and Python from a key."""
    seed_generators(derive_seed(*key))


def generator_states() -> tuple[Any, ...]:
    """Return the states of the global CPU generators."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def restore_generators(states: tuple[Any, ...]) -> None:
    """Restore the states from `generator_states`."""
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
