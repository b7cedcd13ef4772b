"""Standard streams that are closed, full, or no longer read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from ablab.screen import tolerate_broken_streams
tolerate_broken_streams()
tolerate_broken_streams()
with open(sys.argv[1], "w") as file:
    print("a line of output", flush=True)
    print("ü", flush=True)
    print("a warning", file=sys.stderr)
    os.write(1, b"from a library")
    file.write(f"{sys.stdout.isatty()} {sys.stdout.encoding.lower()}")
print("the last words")
"""
SAID = b"warning: stdout: %s; nothing more is printed there\n"


def start(tmp_path: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The program as a shell starts it; its own file shows that nothing printed has landed in it."""
    line = f'"$0" -c "$1" "$2" {redirection}'
    words = ["bash", "-c", line, sys.executable, PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, timeout=100, check=False)
    assert (tmp_path / "file").read_text().split()[0] == "False"
    return done


@pytest.mark.parametrize(
    ("redirection", "stderr"),
    [
        (">&-", b"a warning\n"),
        ("<&- >&-", b"a warning\n"),
        (">/dev/full", SAID % b"No space left on device" + b"a warning\n"),
        ("1</dev/null", SAID % b"Bad file descriptor" + b"a warning\n"),
        ("2>&-", b""),
        (">&- 2>&-", b""),
        ("<&- >&- 2>&-", b""),
        (">/dev/full 2>/dev/full", b""),
        ("2>/dev/full", b""),
    ],
)
def test_a_program_goes_on_without_a_stream(tmp_path: Path, redirection: str, stderr: bytes) -> None:
    done = start(tmp_path, redirection)
    assert (done.returncode, done.stderr) == (0, stderr)


def test_a_program_goes_on_when_the_reader_of_its_output_leaves(tmp_path: Path) -> None:
    here, there = os.pipe()
    os.close(here)
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    done = subprocess.run(words, stdout=there, stderr=subprocess.PIPE, timeout=100, check=False)
    os.close(there)
    assert (done.returncode, done.stderr) == (0, SAID % b"Broken pipe" + b"a warning\n")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_streams_that_are_there_print_as_ever(tmp_path: Path, environment: dict[str, str]) -> None:
    done = start(tmp_path, "", PYTHONIOENCODING="utf-8", **environment)
    assert done.stdout == "a line of output\nü\nfrom a librarythe last words\n".encode()
    assert done.stderr == b"a warning\n"


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    done = start(tmp_path, "", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith(b"a line of output\n\\xfc\n")


def test_a_run_whose_output_is_read_no_more_is_complete(tmp_path: Path) -> None:
    here, there = os.pipe()
    os.close(here)
    words = [sys.executable, str(ROOT / "train.py"), "trainer=smoke", "logger=csv", "folder=run"]
    done = subprocess.run(words, cwd=tmp_path, stdout=there, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(there)
    assert done.returncode == 0
    assert done.stderr.startswith(SAID % b"Broken pipe")
    assert b"Traceback" not in done.stderr
    assert '"status": "finished"' in (tmp_path / "run" / "run.json").read_text()
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") > 1
