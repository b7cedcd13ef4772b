"""Alternating time measurements, and the spread of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

WARMUP = 3  # untimed rounds

Step = Callable[[], float | None]  # may return its own time in seconds


@dataclass(frozen=True)
class Ratio:
    """A row of a table: the measured object, its peer, and the ratio of their times over the rounds."""

    place: str
    what: str
    peer: str
    median: float
    first_quartile: float
    third_quartile: float
    rounds: int
    ours: float
    unit: str = "ms"


@dataclass(frozen=True)
class Time:
    """A row of a table without a peer: a time in seconds."""

    place: str
    what: str
    median: float
    first_quartile: float
    third_quartile: float
    rounds: int


def measure(
    place: str, what: str, step: Step, peer: str, peers_step: Step, rounds: int, *, warmup: int = WARMUP
) -> Ratio:
    """Run the two steps in turns, alternating which is first."""
    times: dict[Step, list[float]] = {step: [], peers_step: []}
    warmup = min(warmup, rounds)
    for round_number in range(warmup + rounds):
        for one in (step, peers_step) if round_number % 2 else (peers_step, step):
            synchronize()
            start = time.perf_counter()
            own_time = one()
            synchronize()
            if round_number >= warmup:
                times[one].append(time.perf_counter() - start if own_time is None else own_time)
    return compare_times(place, what, times[step], peer, times[peers_step])


def compare_times(
    place: str, what: str, ours: list[float], peer: str, theirs: list[float], *, unit: Literal["ms", "MiB"] = "ms"
) -> Ratio:
    """Return the row for the seconds, or MiB, of each round."""
    first, median, third = quartiles([one / other for one, other in zip(ours, theirs, strict=True)])
    own = (1000 if unit == "ms" else 1) * statistics.median(ours)
    return Ratio(place, what, peer, median, first, third, len(ours), own, unit)


def spread(place: str, what: str, step: Step, rounds: int, *, warmup: int = 1) -> Time:
    """Time one step repeatedly."""
    times = []
    for _ in range(warmup + rounds):
        start = time.perf_counter()
        own_time = step()
        synchronize()
        times.append(time.perf_counter() - start if own_time is None else own_time)
    first, median, third = quartiles(times[warmup:])
    return Time(place, what, median, first, third, rounds)


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
