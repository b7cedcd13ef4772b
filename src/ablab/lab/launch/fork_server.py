"""The process from which the project's other processes are forked."""

from __future__ import annotations

import multiprocessing as mp
import signal
import threading
from multiprocessing import forkserver


def start_fork_server() -> None:
    """Start multiprocessing's fork server, unless it is running.

    It loads the libraries and does nothing else, so that its forks begin at once and inherit no GPU and no threads.
    """
    mp.get_context("forkserver").set_forkserver_preload(["ablab.lab.train"])
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C would end the server while it loads
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)
