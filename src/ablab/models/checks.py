"""Argument checks shared by the architectures."""

from __future__ import annotations


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1, naming its keyword."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1 is needed")


def check_probabilities(**values: float) -> None:
    """Raise ValueError for a dropout probability outside [0, 1), naming its keyword."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: a probability is needed, at least 0 and below 1")
