"""SIGHUP: a terminal that closes has the run saved and stopped; under nohup it goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.polling import take_signals

from ablab.errors import STOPPED

PROGRAM = """
import os, signal, sys
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from ablab.lab.run import signals
signals.install()
if sys.argv[2] == "saving":
    signals.defer()
with signals.default_handlers():
    if sys.argv[1] == "nohup":
        os.kill(os.getpid(), signal.SIGHUP)
signals.restore()
os.kill(os.getpid(), signal.SIGHUP)
print(signals.requested and signals.requested.name)
"""


@pytest.mark.parametrize(
    ("shell", "phase", "returncode", "printed"),
    [
        ("terminal", "saving", 0, "SIGHUP"),
        ("terminal", "starting", STOPPED, ""),
        ("nohup", "saving", 0, "None"),
        ("nohup", "starting", 0, "None"),
    ],
)
def test_sighup_stops_unless_it_is_ignored(shell: str, phase: str, returncode: int, printed: str) -> None:
    words = [sys.executable, "-c", PROGRAM, shell, phase]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=take_signals)
    assert (done.returncode, done.stderr) == (returncode, "")
    assert done.stdout.strip() == printed
