"""The pages in docs/: tables are what the code says, and code blocks run."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ablab.errors import ConfigError
from ablab.lab.ablation.ablation import Ablation
from ablab.norms import LayerNorm, NoNorm, RMSNorm, WeightNorm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "norms.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_table_of_norms_is_what_the_norms_say(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Norms that somebody adds have a row when the script has written one."""
    result = command(script="scripts/norms_table.py")
    assert result.returncode == 0, result.stderr
    [table] = re.findall(r"<!-- written by .*? -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    assert len(table.splitlines()) > 20
    for row in table.splitlines():
        assert row in result.stdout.splitlines(), "run python scripts/norms_table.py --write"


def test_the_python_of_the_page_on_norms_runs() -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["logits"].shape == (32, 10)
    assert names["layers"] == 9


COMMANDS = [line.split("#")[0].strip() for code in blocks("bash") for line in code.splitlines()]


def test_the_page_on_data_names_data_sets_that_there_are() -> None:
    table = DATA.split("| `data=` |")[1].split("\n\n")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"\w+", row)}
    assert names <= {file.stem for file in (ROOT / "conf" / "data").glob("*.yaml")}
    assert len(names) > 10


@pytest.mark.slow
@pytest.mark.parametrize("line", [line.split("#")[0].strip() for c in blocks("bash", DATA) for line in c.splitlines()])
def test_every_command_of_the_page_on_data_runs(line: str, run: Callable[..., Any], files: Path) -> None:
    assert run(*line.replace("FOLDER", f"{files}/images").split()[2:]).metrics


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_on_norms_runs(line: str, run: Callable[..., Any]) -> None:
    assert line.startswith("python train.py ")
    assert run(*line.split()[2:]).metrics


ABLATIONS = (ROOT / "docs" / "ablations.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line.strip() for code in blocks("bash", ABLATIONS) for line in code.splitlines()])
def test_every_command_of_the_page_on_ablations_runs(
    line: str, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    short = ["trainer=smoke", "trainer.max_epochs=1", "logger=csv"]
    fewer = ["hydra.sweeper.num_trials=2"] if "optuna" in line else ["seed=0", "norm=batchnorm,groupnorm"]
    result = command(*shlex.split(line)[2:], *short, *fewer)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_page_on_ablations_shows_a_file_that_is_one() -> None:
    [code, tune] = blocks("yaml", ABLATIONS)
    content = yaml.safe_load(code)["ablation"]
    content.pop("_target_")
    with pytest.raises(ConfigError, match="it is no level"):
        Ablation(**{**content, "baseline": {"norm": "nothing"}})
    assert len(Ablation(**content, **yaml.safe_load(tune)).cells()) == 3


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], list[Any]]:
    """The rows of a benchmark of few rounds, some of whose module's constants are smaller."""
    monkeypatch.syspath_prepend(ROOT / "scripts")

    def measure(suite: str, smaller: dict[str, Any]) -> list[Any]:
        module = importlib.import_module(f"benchmarks.{suite}")
        for name, value in smaller.items():
            monkeypatch.setattr(module, name, value)
        return list(importlib.import_module("benchmark").SUITES[suite](1, torch.device("cpu"), None))

    return measure


def test_the_benchmark_of_norms_measures_pairs(rows: Callable[..., list[Any]]) -> None:
    norms = {"layernorm": LayerNorm(), "rmsnorm": RMSNorm(), "weightnorm": NoNorm(weight=WeightNorm())}
    found = rows("norms", {"NORMS": norms})
    assert {row.place for row in found} == {"ResNet-20", "transformer", "LSTM", "LSTM, deeper"}
    assert {row.peer for row in found} >= {"nn.LSTM", "nn.LayerNorm", "weight_norm", "no norm"}
    assert all(row.ours > 0 for row in found)


def test_the_benchmark_of_data_measures_against_two_peers(rows: Callable[..., list[Any]]) -> None:
    found = rows("data", {"BATCH": 64, "BATCHES": 4})
    peers = {(row.what, row.peer) for row in found}
    assert peers >= {("crop, flip, standardize", "PIL decode"), ("mixup", "not augmented")}
    assert all(row.ours > 0 for row in found)


@pytest.mark.thorough
@pytest.mark.parametrize("suite", ["norms", "data"])
def test_a_whole_benchmark_prints_its_rows(suite: str, command: Callable[..., Any]) -> None:
    done = command(suite, "--rounds", "1", script="scripts/benchmark.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:] if not line.startswith(" ")]
    assert len(rows) >= 6
    assert all(float(row[-3]) > 0 for row in rows)


CLUSTER = (ROOT / "docs" / "cluster.md").read_text()


def of_clusters(line: str) -> Any:
    """A command of the page, without its comment.

    Four processes are tested in tests/data/test_processes.py, too, a sweep of runs of two in tests/runs.
    """
    repeated = "trainer.devices=4" in line or " -m trainer=ddp_cpu" in line
    return pytest.param(line.split("#")[0].strip(), marks=[pytest.mark.thorough] * repeated)


@pytest.mark.slow
@pytest.mark.parametrize("line", [of_clusters(line) for c in blocks("bash", CLUSTER) for line in c.splitlines()])
def test_every_command_of_the_page_on_clusters_runs(
    line: str, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    short = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "logger=csv"]
    result = command(*shlex.split(line)[2:], *short, *(["seed=0"] if "-m" in line else []), OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr


CLAIMS = (ROOT / "docs" / "claims.md").read_text()
SETTLING = {
    path.stem: claims
    for path in sorted((ROOT / "conf" / "ablation").glob("*.yaml"))
    if (claims := (yaml.safe_load(path.read_text()) or {}).get("ablation", {}).get("claims"))
}


@pytest.mark.parametrize("name", SETTLING)
def test_every_ablation_that_settles_a_claim_is_on_the_page_of_claims(name: str) -> None:
    assert f"`python train.py ablation={name}`" in CLAIMS
    for claim in SETTLING[name]:
        assert f"\n| {claim} |" in CLAIMS


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_and_links_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
