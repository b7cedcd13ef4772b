"""A newcomer's first steps: the commands that scripts/newcomer.py times are the README's, the environment is empty."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEWCOMER = runpy.run_path(str(ROOT / "scripts" / "newcomer.py"))


def test_a_newcomer_does_what_the_readme_says() -> None:
    first, ablation, _ = ([*commands] for _, commands in NEWCOMER["GOALS"].values())
    readme = (ROOT / "README.md").read_text()
    assert f"\n{first[0]} " in readme
    assert f"\n{ablation[0]} " in readme
    assert (ROOT / "conf" / "ablation" / f"{Path(NEWCOMER['FIGURES']).parts[1]}.yaml").exists()


def test_a_newcomer_has_a_home_a_path_and_a_way_to_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"PIP_INDEX_URL": "a", "https_proxy": "b", "SSL_CERT_FILE": "c", "REQUESTS_CA_BUNDLE": "d"}
    absent = {"PIP_CACHE_DIR": "e", "PYTHONPATH": "f", "WANDB_API_KEY": "g", "VIRTUAL_ENV": "h", "SOME_TOKEN": "i"}
    for name, value in (there | absent).items():
        monkeypatch.setenv(name, value)
    found = NEWCOMER["environment"](tmp_path)
    assert there.items() <= found.items()
    assert not absent.keys() & found.keys()
    assert found["HOME"] == str(tmp_path)
    look_up = [sys.executable, "-c", "import os, shutil; print(*map(shutil.which, ('git', 'make', 'bash', 'python3')))"]
    programs = subprocess.run(look_up, env=found, capture_output=True, text=True, check=True).stdout.split()
    assert "None" not in programs
    assert sys.prefix == sys.base_prefix or not programs[-1].startswith(sys.prefix)


def test_a_step_that_fails_is_said_with_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = NEWCOMER["done"]
    environment = NEWCOMER["environment"](tmp_path)
    assert not done("make nothing", tmp_path, environment, 0.0)
    assert "$ make nothing" in (said := capsys.readouterr().out)
    assert "exit code 2" in said
    (tmp_path / "Makefile").write_text("train:\n\t@echo trained\n")
    assert done("make train", tmp_path, environment, 0.0)
    assert "      trained\n" in capsys.readouterr().out
