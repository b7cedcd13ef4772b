"""The pages in docs/: tables are what the code says, and code blocks run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "norms.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_table_of_norms_is_what_the_norms_say() -> None:
    script = [sys.executable, "scripts/norms_table.py"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() in PAGE, "run python scripts/norms_table.py --write"


def test_the_python_of_the_page_on_norms_runs() -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["logits"].shape == (32, 10)
    assert names["layers"] == 9


COMMANDS = [line.split("#")[0].strip() for code in blocks("bash") for line in code.splitlines()]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")))
def test_the_page_on_data_names_every_data_set(name: str) -> None:
    assert f"`{name}`" in DATA


@pytest.mark.slow
@pytest.mark.parametrize("line", [line.split("#")[0].strip() for c in blocks("bash", DATA) for line in c.splitlines()])
def test_every_command_of_the_page_on_data_runs(line: str, run: Callable[..., Any], files: Path) -> None:
    assert run(*line.replace("FOLDER", f"{files}/images").split()[2:]).metrics


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_on_norms_runs(line: str, run: Callable[..., Any]) -> None:
    assert line.startswith("python train.py ")
    assert run(*line.split()[2:]).metrics


def test_the_benchmark_measures_pairs() -> None:
    script = [sys.executable, "scripts/benchmark.py", "norms", "--rounds", "1"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert {row[0].strip(",") for row in rows} == {"ResNet-20", "transformer", "LSTM"}
    assert all(float(row[-3]) > 0 for row in rows)


@pytest.mark.slow
def test_the_benchmark_of_data_measures_against_two_peers() -> None:
    script = [sys.executable, "scripts/benchmark.py", "data", "--rounds", "1"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("CIFAR-10")]
    assert {" ".join(row[1:-3]) for row in rows} >= {"crop, flip, standardize PIL decode", "mixup not augmented"}
    assert all(float(row[-3]) > 0 for row in rows)
