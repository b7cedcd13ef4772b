"""Handlers for requests to stop: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and SIGHUP take effect between two steps.

Schedulers send one some time before they kill a job, and a closing terminal sends SIGHUP; under nohup, SIGHUP stays
ignored. Until a run has something to save, each signal exits at once.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ablab.errors import ABORTED, STOPPED
from ablab.rank import rank

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

requested: signal.Signals | None = None
installed = False
deferring = False


def install() -> None:
    """Install the handlers for the whole process: for a program that trains, not for a notebook."""
    global installed
    installed = True
    restore()
    atexit.register(ignore_all)  # the run is recorded by then; interpreter shutdown must not change the exit code


def restore() -> None:
    """Reinstall the handlers after Lightning has replaced them."""
    if installed:
        for number in handled_signals():
            signal.signal(number, handle)


@contextmanager
def handling() -> Iterator[None]:
    """Install the handlers inside this context, and restore the previous ones after it."""
    global installed, requested
    before, was_installed = {number: signal.getsignal(number) for number in handled_signals()}, installed
    installed = True
    try:
        defer()
        restore()
        yield
    finally:
        installed, requested = was_installed, None
        stop_deferring()
        for number, handler in before.items():
            signal.signal(number, handler)


def handled_signals() -> list[signal.Signals]:
    """Return the signals that stop this process: SIGHUP is left out if it is ignored, as under nohup."""
    return [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def ignore_all() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def default_handlers() -> Iterator[None]:
    """Use the default handlers inside this context: Python's own do not run while it waits in C++ code."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in handled_signals()} if installed else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle(number: int, frame: FrameType | None) -> None:
    """Handle a signal: exit at once, or record it for the training loop."""
    global requested
    if not deferring:
        os._exit(STOPPED)
    if requested == signal.SIGINT == number:
        os._exit(ABORTED)
    requested = signal.Signals(number)
    if number == signal.SIGINT and rank() == 0:
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; Ctrl-C again leaves at once\n")


def defer() -> None:
    """Defer signals to the end of the step from now on, since there is something to save."""
    global deferring
    deferring = True


def stop_deferring() -> None:
    """Exit at once on the next signal again, since the run has ended."""
    global deferring
    deferring = False
