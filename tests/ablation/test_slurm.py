"""The commands of an array of Slurm's jobs: true, and without secrets; a real Slurm is in tests/cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ablab.lab.launch.slurm import Site, run_command

WORDS = ["norm=batchnorm", "logger.wandb.notes='it\\'s $HOME `x` \"abcdefgh\" https://me:pa55@host'", "data.token=hf_1"]


def test_a_word_with_a_secret_reaches_a_job_and_not_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh")
    hidden: dict[str, str] = {}
    runs: list[Any] = [SimpleNamespace(overrides=[*WORDS, f"seed={seed}"]) for seed in range(2)]
    lines = [
        run_command(run, Site(python=f"{sys.executable} -c 'import sys; print(sys.argv[3:])'"), hidden) for run in runs
    ]
    assert not any(secret in line for secret in ("abcdefgh", "pa55", "hf_1") for line in lines)
    assert hidden == {"ABLAB_WORD_0": WORDS[1], "ABLAB_WORD_1": WORDS[2]}
    shell = ["bash", "-c", 'eval "exec $line"']
    for seed, line in enumerate(lines):
        job = {**os.environ, **hidden, "line": line}
        printed = subprocess.run(shell, env=job, capture_output=True, encoding="utf-8", check=True).stdout
        assert printed == f"{[*WORDS, f'seed={seed}']}\n"
    done = subprocess.run(
        shell, env={**os.environ, "line": lines[0]}, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode != 0
    assert "ABLAB_WORD_0: has a secret that is not in this file; submit with --export=ALL" in done.stderr
