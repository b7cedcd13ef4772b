"""Programs in processes of their own, forked from one that has loaded the libraries, which takes most of a short run.

What is under test is loaded by each of them anew, as by the command line.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = ["torch", "lightning.pytorch", "torchmetrics.classification", "hydra", "safetensors.torch"]
LIBRARIES += ["sklearn.datasets", "pandas", "scipy.stats", "matplotlib.figure", "rich.live"]

context = mp.get_context("forkserver")
context.set_forkserver_preload(LIBRARIES)


def run(
    script: Path, words: Sequence[str], *, folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of a script, in a folder, with what it prints.

    Raises:
        TimeoutExpired: it took longer, and was ended.
    """
    printed = [folder / f".stdout-{os.urandom(4).hex()}", folder / f".stderr-{os.urandom(4).hex()}"]
    process = context.Process(target=be, args=(str(script), list(words), str(folder), dict(environment), printed))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired([str(script), *words], timeout)
    out, err = (file.read_text() if file.exists() else "" for file in printed)
    for file in printed:
        file.unlink(missing_ok=True)
    return subprocess.CompletedProcess([sys.executable, str(script), *words], process.exitcode, out, err)


def be(script: str, words: list[str], folder: str, environment: dict[str, str], printed: list[Path]) -> None:
    """Become a program that has just been started, and end as it does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(printed, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own children leave without
