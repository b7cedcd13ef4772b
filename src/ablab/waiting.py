"""What takes longer than a moment says so, in plain lines that become rarer: for a person who waits, or reads a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ablab.rank import rank

T = TypeVar("T")

MOMENT = 2.0  # seconds that nobody needs to be told of
awaits: list[object] = []  # what is going on, the innermost last: it alone speaks
heard = True  # whether anybody is to be told


def pause(spent: float, first: float = MOMENT) -> float:
    """Seconds until the next line of something that has taken so long: as many again, a minute at most."""
    return min(60.0, max(first, spent))


def is_heard() -> bool:
    """Whether a line of this process is for somebody: of several the first one speaks."""
    return heard and rank() == 0


@contextmanager
def awaited(what: str | Callable[[float], str]) -> Iterator[None]:
    """Say what is going on while it does, if it takes more than a moment.

    Args:
        what: in words, or words for the seconds so far.
    """
    if not is_heard():
        yield
        return
    began, over, this = time.monotonic(), threading.Event(), object()

    def speak() -> None:
        spent = 0.0
        while not over.wait(pause(spent)):
            spent = time.monotonic() - began
            if awaits[-1] is this:
                print(what(spent) if callable(what) else f"{what}: {spent:.0f} s", flush=True)

    awaits.append(this)
    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()
        awaits.remove(this)


@contextmanager
def on_a_terminal_alone() -> Iterator[None]:
    """Say nothing of it where stdout is none: for a program whose output others read."""
    global heard
    before, heard = heard, sys.stdout.isatty()
    try:
        yield
    finally:
        heard = before


def counted(items: Iterable[T], total: int, what: str) -> Generator[T]:
    """The items, while it is said how many of them are done: to be closed where what is done with one may fail.

    Args:
        items: each done once the next is asked for.
        total: how many there are.
        what: is done with them, in words.
    """
    done = 0

    def words(spent: float) -> str:
        left = f", {spent * (total - done) / done:.0f} s left" if done else ""
        return f"{what}: {done:,} of {total:,}{left}"

    with awaited(words):
        for item in items:
            yield item
            done += 1
