"""A real Slurm of two node names on this machine, for the tests of this folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.polling import LIMIT

SCRIPT = Path(__file__).parent / "slurm.sh"
MISSING = [name for name in ("slurmctld", "slurmd", "srun", "munged") if shutil.which(name) is None]
Slurm = Callable[..., str]


def with_tests(environment: Mapping[str, str]) -> str:
    """Return a PYTHONPATH on which the tests' own callbacks are found, too."""
    return os.pathsep.join(filter(None, [str(SCRIPT.parents[2]), environment.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def slurm_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a program needs to find the Slurm, which is up as long as the tests are."""
    if MISSING:
        pytest.skip(f"needs a Slurm to start: {', '.join(MISSING)} not installed")
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a Slurm")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", str(SCRIPT), "up", str(folder)], check=True, timeout=LIMIT)
    yield {
        **os.environ,
        "SLURM_CONF": f"{folder}/slurm.conf",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    subprocess.run(["bash", str(SCRIPT), "down", str(folder)], check=True, timeout=LIMIT)


@pytest.fixture(scope="session")
def slurm(slurm_environment: dict[str, str]) -> Slurm:
    """Run one of Slurm's commands; what it prints."""

    def command(*words: str, cwd: Path | None = None, **more: str) -> str:
        environment = {**slurm_environment, **more}
        done = subprocess.run(
            list(words), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return command


@pytest.fixture(scope="session")
def state(slurm: Slurm) -> Callable[[str], str]:
    """The state of a job, or of an element of an array."""
    return lambda job: slurm("scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


@pytest.fixture(scope="session")
def wait(state: Callable[[str], str]) -> Callable[..., str]:
    """Wait until a job has one of some states; which."""

    def until(job: str, *wanted: str) -> str:
        deadline = time.monotonic() + LIMIT
        while (found := state(job)) not in wanted:
            assert time.monotonic() < deadline, f"job {job} is {found}, not {wanted}"
            time.sleep(0.5)
        return found

    return until


@pytest.fixture(scope="session")
def record() -> Callable[[Path], dict[str, Any]]:
    """A run's run.json."""

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text())
        return found

    return read
