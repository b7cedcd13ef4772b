"""Run Python scripts in processes forked from one that has imported the libraries.

The imports take most of a short run's time. Each process loads the code under test anew, as the command line does.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

LIBRARIES = ["torch", "lightning.pytorch", "torchmetrics.classification", "hydra", "safetensors.torch"]
LIBRARIES += ["sklearn.datasets", "pandas", "scipy.stats", "matplotlib.figure", "rich.live"]

# A script that is `python -m pytest` with its arguments, in the working directory. Processes that its tests fork import
# it again. Hydra brings a plugin for pytest, which complains that the libraries have been loaded before it.
PYTEST = """import os, sys
import pytest

if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    sys.exit(pytest.main(["-W", "ignore:Module already imported so cannot be rewritten", *sys.argv[1:]]))
"""

context = mp.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


class Popen:
    """Start a Python script as `subprocess.Popen([sys.executable, script, ...])` does, without its imports.

    `PIPE` captures a stream in a temporary file, so that a process never waits for its reader.

    Args:
        line: `sys.executable`, the script and its arguments.
        cwd: the working directory.
        env: the environment; None for this process's.
        stdin, stdout, stderr: a descriptor, `DEVNULL`, `PIPE`, `STDOUT` (stderr) or None for this process's own.
        start_new_session: whether the process leads a session of its own.
        text: accepted for `subprocess.Popen`'s sake, as is `encoding`: captured streams are always text.
    """

    def __init__(
        self,
        line: Sequence[str | Path],
        *,
        cwd: Path | str,
        env: Mapping[str, str] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        start_new_session: bool = False,
        text: bool = True,
        encoding: str = "utf-8",
    ) -> None:
        assert line[0] == sys.executable
        assert text
        assert encoding == "utf-8"
        self.args = [str(word) for word in line]
        self.captured: dict[int, int] = {}
        with open(os.devnull, "r+b") as nothing:
            streams = []
            for number, asked in enumerate((stdin, stdout, stderr)):
                match asked:
                    case subprocess.PIPE:
                        self.captured[number], name = tempfile.mkstemp()
                        os.unlink(name)
                        streams.append(self.captured[number])
                    case subprocess.DEVNULL:
                        streams.append(nothing.fileno())
                    case subprocess.STDOUT:
                        streams.append(streams[1])
                    case None:
                        streams.append(number)
                    case descriptor:
                        streams.append(descriptor)
            environment = dict(os.environ if env is None else env)
            arguments = (self.args[1:], str(cwd), environment, [Stream(number) for number in streams])
            self.process = context.Process(target=be, args=(*arguments, start_new_session, search_path()))
            self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process.

        Raises:
            TimeoutExpired: the process takes longer.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end of the process, and return its captured stdout and stderr."""
        self.wait(timeout)
        return self.text_of(1), self.text_of(2)

    def text_of(self, number: int) -> str:
        """Return what a captured stream has got so far: 1 is stdout, 2 is stderr."""
        if number not in self.captured:
            return ""
        descriptor = self.captured[number]
        text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)  # a seek would move the writer, too
        return text.decode().replace("\r\n", "\n")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            assert self.pid is not None
            with suppress(ProcessLookupError):  # the process has just ended, and its exit code is on the way
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        for descriptor in self.captured.values():
            os.close(descriptor)


class Stream:
    """A descriptor that goes to a new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return DupFd(self.number)

    def __setstate__(self, state: Any) -> None:
        self.number = state.detach()


def run(
    script: Path, words: Sequence[str], *, folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder to its end, as `subprocess.run` does.

    Raises:
        TimeoutExpired: the script took longer, and was killed.
    """
    line = [sys.executable, str(script), *words]
    process = Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(line, process.returncode, out, err)


@cache
def search_path() -> list[str]:
    """Return the module search path of a new Python, without its script's folder and PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    found: list[str] = json.loads(subprocess.run(line, env=environment, capture_output=True, check=True).stdout)
    return found


def be(
    line: list[str],
    folder: str,
    environment: dict[str, str],
    streams: list[Stream],
    new_session: bool,
    path: list[str],
) -> None:
    """Become a program that has just been started, and end as one."""
    if new_session:
        os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started pytest may have ignored it, as nohup does
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode |= bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    for number, stream in enumerate(streams):
        os.dup2(stream.number, number)
    for descriptor in {stream.number for stream in streams}:
        os.close(descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (multiprocessing has put /dev/null there)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    mp.set_start_method(None, force=True)  # multiprocessing has made its own the default
    os.environ.setdefault("ABLAB_START_METHOD", "fork")  # a program's own workers need no imports either
    script = line[0]
    sys.argv = list(line)
    given = environment.get("PYTHONPATH", "")
    sys.path[:] = [str(Path(script).resolve().parent), *filter(None, given.split(os.pathsep)), *path]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path_importer_cache.clear()
    code: Any = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)
