"""Print status lines for slow operations, at increasing intervals."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ablab.rank import rank

T = TypeVar("T")

MIN_SECONDS = 2.0  # seconds before the first status line
running: list[object] = []  # nested operations in progress; only the innermost prints
enabled = True


def next_delay(spent: float, first: float = MIN_SECONDS) -> float:
    """Return the seconds until the next line: as many as have passed, at least `first` and at most 60."""
    return min(60.0, max(first, spent))


def is_enabled() -> bool:
    """Return whether this process prints status lines; only rank 0 does."""
    return enabled and rank() == 0


@contextmanager
def status_lines(what: str | Callable[[float], str]) -> Iterator[None]:
    """Print status lines while an operation runs, if it takes longer than two seconds.

    Args:
        what: description of the operation, or a function from the seconds so far to a line.
    """
    if not is_enabled():
        yield
        return
    began, is_over, this = time.monotonic(), threading.Event(), object()

    def print_lines() -> None:
        spent = 0.0
        while not is_over.wait(next_delay(spent)):
            spent = time.monotonic() - began
            if running[-1] is this:
                print(what(spent) if callable(what) else f"{what}: {spent:.0f} s", flush=True)

    running.append(this)
    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        running.remove(this)


@contextmanager
def only_on_a_terminal() -> Iterator[None]:
    """Print no status lines unless stdout is a terminal, for programs whose output is read by others."""
    global enabled
    before, enabled = enabled, sys.stdout.isatty()
    try:
        yield
    finally:
        enabled = before


def with_progress(items: Iterable[T], total: int, what: str) -> Generator[T]:
    """Yield items, with status lines about the progress. Close the generator if processing an item may fail.

    Args:
        items: the items; one counts as done when the next is requested.
        total: number of items.
        what: description of the operation.
    """
    done = 0

    def words(spent: float) -> str:
        left = f", {spent * (total - done) / done:.0f} s left" if done else ""
        return f"{what}: {done:,} of {total:,}{left}"

    with status_lines(words):
        for item in items:
            yield item
            done += 1
