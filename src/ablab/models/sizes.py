"""Sizes that every architecture checks alike."""

from __future__ import annotations


def at_least_one(**sizes: int) -> None:
    """Refuse sizes below 1, by the names that they are given under."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1 is needed")
