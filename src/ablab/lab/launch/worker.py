"""DDP worker entry point (rank > 0), started by `ablab.lab.launch.processes` alone.

The config comes through the standard input, so that it cannot be another one; when that closes, the process that has
started this one is gone, and this one leaves. How it failed goes back through a pipe.
"""

from __future__ import annotations

import gc

from ablab.lab.run import signals

if __name__ == "__main__":
    signals.install()
    signals.defer()  # it belongs to a run from its first moment
    gc.disable()  # until the libraries are loaded, see ablab.lab.loading

import json
import os
import signal
import sys
import threading
import time
import traceback

from omegaconf import OmegaConf

from ablab.errors import CRASHED, FINISHED, ConfigError, RunError, Stopped
from ablab.lab.loading import loading
from ablab.rank import REPORTS
from ablab.screen import keep_going_without_streams

PATIENCE = 10.0  # seconds until a starter that does not end the others is taken to hang


def main() -> None:
    keep_going_without_streams()
    told = json.loads(first_line())
    sys.path[:] = told["path"]
    threading.Thread(target=leave_with_the_starter, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the first process speaks for all
    with loading():
        from ablab.lab.train import train

    try:
        train(OmegaConf.create(told["config"]))
    except Stopped:
        os._exit(FINISHED)
    except BaseException as error:
        report(error)
        time.sleep(PATIENCE)  # the starter ends all processes of the run; one that does not answer is ended itself
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(CRASHED)


def report(error: BaseException) -> None:
    """Tell the starter how this process failed."""
    facts = {
        "type": type(error).__name__,
        "text": str(error),
        "code": error.exit_code if isinstance(error, RunError) else CRASHED,
        "known": isinstance(error, RunError | ConfigError),
        "traceback": "".join(traceback.format_exception(error)),
    }
    os.write(int(os.environ[REPORTS]), json.dumps(facts).encode() + b"\n")


def first_line() -> bytes:
    """From the standard input, without a buffer: a thread waits for its end later."""
    line = b""
    while not line.endswith(b"\n"):
        if not (part := os.read(0, 1 << 16)):
            os._exit(CRASHED)
        line += part
    return line


def leave_with_the_starter() -> None:
    while os.read(0, 1 << 16):
        pass
    os._exit(CRASHED)


if __name__ == "__main__":
    main()
