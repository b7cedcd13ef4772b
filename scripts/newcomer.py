"""Follow the first steps of a newcomer in a clean clone with an empty home, and report how long they take.

    python3 scripts/newcomer.py      the checked-out commit; needs Python, git, make and packages for pip

There are three goals, each with a time limit in minutes on two cores, installation included: a first run (3), a first
ablation with its figure (6), a new norm, trained and run through the tests of all norms (15). Other cores are left
unused. Exit code 1: a command failed. Exceeding a limit is reported, but is no failure: machines differ.

"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = "runs/norm_batch_size/report/figures"
GOALS: dict[str, tuple[int, list[str]]] = {  # minutes since the start, and the commands
    "a first run": (3, ["make train"]),
    "an ablation and its figure": (
        6,
        [
            "python train.py ablation=norm_batch_size norm=batchnorm,groupnorm seed=0,1",
            f"ls {FIGURES}/*.png",
        ],
    ),
    "a norm of one's own, in the tests": (
        15,
        [
            "python scripts/new.py norm my_norm",
            "python train.py norm=my_norm",
            "python -m pytest tests/norms -k my_norm",
        ],
    ),
}
ACTIVATED = "source .venv/bin/activate && "
LAST, LAST_OF_FAILED = 4, 40  # lines of output to print
# Variables for network access to packages, without pip's cache, which a newcomer does not have.
NETWORK = re.compile(r"PIP_(?!CACHE_DIR).*|SSL_.*|.*_CA_BUNDLE|.*_proxy", re.IGNORECASE)


def main() -> int:
    cores = two_cores()
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f} before")
    with tempfile.TemporaryDirectory() as folder:
        home, clone = Path(folder, "home"), Path(folder, "ablab")
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        started, report = time.monotonic(), []
        for goal, (minutes, commands) in GOALS.items():
            for command in commands:
                if not done(command, clone, environment(home), started):
                    return 1
            seconds = time.monotonic() - started
            over = ", too long" if seconds > 60 * minutes else ""
            report.append(f"{goal:<35} {clock(seconds)} of {clock(60 * minutes)}{over}")
    print("", *report, f"load {os.getloadavg()[0]:.1f} at the end", sep="\n")
    return 0


def two_cores() -> int:
    """Restrict this process to two cores where possible; return the number of usable cores."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    return len(os.sched_getaffinity(0))


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a new login: a home, a path with the required programs, and access to packages."""
    python = Path(sys.base_prefix) / "bin"  # not the one of an active virtual environment
    programs = [shutil.which(name) for name in ("git", "make")]
    path = [str(python), *(str(Path(program).parent) for program in programs if program), os.confstr("CS_PATH") or ""]
    kept = {name: value for name, value in os.environ.items() if NETWORK.fullmatch(name)}
    own = [Path.home() / place for place in (".config/pip/pip.conf", ".pip/pip.conf")]
    if settings := [str(file) for file in own if file.exists()]:
        kept.setdefault("PIP_CONFIG_FILE", settings[0])
    return {**kept, "HOME": str(home), "PATH": os.pathsep.join(path)}


def done(command: str, clone: Path, environment: dict[str, str], started: float) -> bool:
    """Run a command, print its time and the last lines of its output, and return whether it succeeded."""
    print(f"\n{clock(time.monotonic() - started)}  $ {command}", flush=True)
    words = command if command.startswith("make") else ACTIVATED + command
    result = subprocess.run(
        ["bash", "-c", words],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        encoding="utf-8",
    )
    failed = result.returncode != 0
    for line in result.stdout.splitlines()[-(LAST_OF_FAILED if failed else LAST) :]:
        print(f"      {line}")
    print(f"{clock(time.monotonic() - started)}  {f'exit code {result.returncode}' if failed else 'done'}", flush=True)
    return not failed


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:>2}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
