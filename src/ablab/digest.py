"""Hashes of tensors and plain values, to fingerprint data and weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """Return a SHA-256 hash of tensors (values, shapes, dtypes) and of plain values (by their repr)."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode())
            sha.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            text = repr(part).encode()
            sha.update(b"%d:" % len(text) + text)  # the length separates it from the next part
    return sha.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors that does not depend on their order."""
    return digest(*(part for name in sorted(weights) for part in (name, weights[name])))
