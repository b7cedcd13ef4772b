"""Sizes that every architecture checks alike."""

from __future__ import annotations


def at_least_one(**sizes: int) -> None:
    """Refuse sizes below 1, by the names that they are given under."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1 is needed")


def probabilities(**chances: float) -> None:
    """Refuse what is no probability, or certainty, by the names that they are given under."""
    for name, chance in chances.items():
        if not 0 <= chance < 1:
            raise ValueError(f"{name}={chance}: a probability is needed, at least 0 and below 1")
