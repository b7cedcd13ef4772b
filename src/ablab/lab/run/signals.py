"""Requests to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP are noted here, and acted upon between two steps.

A scheduler sends one some time before it kills, and a terminal that closes sends SIGHUP; under nohup, which has SIGHUP
ignored, it stays ignored. Before the run has anything to save, each leaves at once.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ablab.errors import ABORTED, STOPPED
from ablab.rank import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

requested: signal.Signals | None = None
installed = False
saving = False
forwards: list[Callable[[int], None]] = []  # called with each signal that is noted


def install() -> None:
    """Note these signals from now on, instead of what they did: for a program that trains, not for a notebook."""
    global installed
    installed = True
    restore()
    atexit.register(ignore)  # what has been done is recorded; Python's last moments are not worth another exit code


def restore() -> None:
    """Note them again, where Lightning has put its own handlers since."""
    if installed:
        for number in heeded():
            signal.signal(number, note)


@contextmanager
def noted() -> Iterator[None]:
    """Note them in a part of a program, which keeps its own handlers for the rest."""
    global installed, requested
    before, was_installed = {number: signal.getsignal(number) for number in heeded()}, installed
    installed = True
    try:
        begin()
        restore()
        yield
    finally:
        installed, requested = was_installed, None
        end()
        for number, handler in before.items():
            signal.signal(number, handler)


def heeded() -> list[signal.Signals]:
    """The signals that stop this process: SIGHUP is none of them where nohup has it ignored."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def ignore() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def at_once() -> Iterator[None]:
    """Let them end the process as they do without Python, which notes none while it waits in C++."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in heeded()} if installed else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note(number: int, frame: FrameType | None) -> None:
    """Handle a signal: leave at once, or remember it for the training to see."""
    global requested
    if not saving:
        os._exit(STOPPED)
    if requested == signal.SIGINT == number:
        os._exit(ABORTED)
    requested = signal.Signals(number)
    for forwarded in forwards:
        forwarded(number)
    if number == signal.SIGINT and rank() == 0:
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")


@contextmanager
def forward(to: Callable[[int], None]) -> Iterator[None]:
    """Forward the signals that are noted within; each of them waits for those who get it."""
    forwards.append(to)
    begin()
    restore()
    try:
        yield
    finally:
        end()
        forwards.remove(to)


def begin() -> None:
    """From now on there is something to save: a signal waits for the end of the step."""
    global saving
    saving = True


def end() -> None:
    """The run has ended: the next signal leaves at once again."""
    global saving
    saving = False
