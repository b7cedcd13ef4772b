"""What is shown while training: lines in a log, a bar on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]


def test_a_log_gets_a_line_with_metrics_and_the_time_that_is_left(run: Callable[..., SimpleNamespace]) -> None:
    printed = run("trainer.max_epochs=2", "trainer.max_steps=-1").printed
    [line] = [line for line in printed.splitlines() if line.startswith("epoch")]
    assert re.fullmatch(
        r"epoch 2, step 2/2: train/accuracy [\d.]+, train/loss [\d.]+, "
        r"val/accuracy [\d.]+, val/loss [\d.]+; \d+ s, done",
        line,
    )


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    command = [sys.executable, str(ROOT / "train.py"), "trainer.max_epochs=2", "logger=csv"]
    process = subprocess.Popen(command, stdout=there, stderr=there, cwd=tmp_path)
    os.close(there)
    shown = b""
    try:
        while chunk := os.read(here, 4096):
            shown += chunk
    except OSError:  # the terminal is closed when the process ends
        pass
    os.close(here)
    assert process.wait() == 0
    bars = [line for line in re.split(r"[\r\n]+", shown.decode()) if line.startswith("Epoch")]
    assert any(re.search(r" \d+/35, .*run=.*val/accuracy=.*train/loss=", bar) for bar in bars), shown.decode()[-2000:]
