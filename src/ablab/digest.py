"""A hash of tensors and of plain values: what the data were, what the weights are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(*parts: Any) -> str:
    """A hash of tensors (values, shapes, types) and of plain values."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            text = repr(part).encode()
            found.update(b"%d:" % len(text) + text)  # its length parts it from the next
    return found.hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A hash of named tensors, whatever their order."""
    return digest(*(part for name in sorted(weights) for part in (name, weights[name])))
