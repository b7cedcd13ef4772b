"""Waiting for another process without depending on how fast the machine is."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests import forked

LIMIT = 600.0  # seconds: only a hang takes as long, on however busy a machine


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str] | forked.Popen | None = None) -> None:
    """Wait until a condition holds.

    Args:
        condition: asked every hundredth of a second.
        process: must not end before the condition holds.

    Raises:
        AssertionError: the process has ended, with what it printed; or nothing happened within `LIMIT` seconds.
    """
    deadline = time.monotonic() + LIMIT
    while not condition():
        if process is not None and process.poll() is not None:
            assert condition(), f"the process ended with {process.returncode}: {process.communicate()}"
            return
        assert time.monotonic() < deadline, f"nothing happened within {LIMIT:.0f} s"
        time.sleep(0.01)


def accepts_connections(port: int) -> bool:
    """Return whether a server listens on a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_caught(process: subprocess.Popen[str] | forked.Popen, number: signal.Signals) -> None:
    """Wait until a process has installed a Python handler for a signal; before that, the signal would kill it."""

    def is_caught() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (number - 1) & 1)

    wait_until(is_caught, process)


def take_signals() -> None:
    """Undo nohup in a process that is about to start (`preexec_fn`): whoever started pytest may have ignored SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
