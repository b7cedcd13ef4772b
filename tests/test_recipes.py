"""docs/recipes.md: its files are extracted and its commands run; LightningModules are also stopped and resumed."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.repository import committed

from ablab.errors import Stopped
from ablab.lab.exact.exact import Exact
from ablab.lab.run import signals
from ablab.lab.run.folder import read_config
from ablab.lab.run.resume import force_add_open_keys
from ablab.lab.train import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
FILES = dict(code.removeprefix("# ").split("\n", 1) for language, code in BLOCKS if language in ("python", "yaml"))
COMMANDS = [shlex.split(line) for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
BUGGY = "task._target_=buggy.Buggy"
GUESTS = [words[2:] for words in COMMANDS if "task=lightning" in words and BUGGY not in words]
OTHERS = [words[2:] for words in COMMANDS if words[1] == "train.py" and "task=lightning" not in words]
SHORT = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.limit_val_batches=1"]
SHORT += ["trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a project with the page's files beside train.py."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copy(ROOT / "train.py", folder)
    shutil.copytree(ROOT / "conf", folder / "conf")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    committed(folder)  # a run warns where no commit can be recorded
    return folder


@pytest.fixture
def importable(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process import the page's modules, and forget them."""
    monkeypatch.syspath_prepend(project)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if f"{name}.py" in FILES:
            del sys.modules[name]


def results(folder: Path) -> tuple[Any, str]:
    """Return the digests of the weights, and metrics.csv."""
    return json.loads((folder / "run.json").read_text())["weights_sha256"], (folder / "metrics.csv").read_text()


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("words", GUESTS, ids=lambda words: words[1].rpartition(".")[2])
def test_a_module_trains_and_resumes_to_the_same_bits(
    words: list[str], run: Callable[..., SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in (command[2] for command in COMMANDS if command[1] == "-c"):
        exec(code, {})
    words = [*force_add_open_keys(words), *SHORT, "trainer=cpu"]
    whole = run(*words, "output_dir=whole")
    metric = whole.cfg.monitor.metric
    if metric is not None:  # the best value, not the last
        with (whole.folder / "metrics.csv").open() as file:
            logged = [float(row[metric]) for row in csv.DictReader(file) if row[metric]]
        assert len(logged) == 2
        assert whole.metrics[metric] == max(logged)

    num_batches, original = 0, Exact.on_train_batch_start

    def count(*arguments: Any) -> None:
        nonlocal num_batches
        num_batches += 1
        if num_batches == 6:  # the second of the second epoch
            signals.requested = signal.SIGTERM
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Exact, "on_train_batch_start", count)
        with pytest.raises(Stopped):
            run(*words, "output_dir=stopped")
    signals.requested = None
    [folder] = (tmp_path / "stopped").iterdir()
    cfg = read_config(folder)
    cfg.resume, cfg.trust = str(folder), True
    train(cfg)
    assert results(folder) == results(whole.folder)


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_a_command_of_a_shipped_task_runs(words: list[str], project: Path, command: Callable[..., Any]) -> None:
    done = command(*words, *SHORT, script=str(project / "train.py"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "val/accuracy" in done.stdout


def test_pdb_stops_in_the_step_and_goes_on(project: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    (tmp_path / "typed").write_text("p batch.inputs.shape\nc\n")
    starter = tmp_path / "starter.py"  # gives a program its input
    starter.write_text(
        "import runpy, sys\n"
        "sys.stdin = open('typed')\n"
        f"sys.path[0] = {str(project)!r}\n"
        f"runpy.run_path({str(project / 'train.py')!r}, run_name='__main__')\n"
    )
    [words] = [words[2:] for words in COMMANDS if BUGGY in words]
    done = command(*words, script=str(starter))
    assert (done.returncode, done.stderr) == (0, "")
    [shown] = re.findall(r"`p batch.inputs.shape` prints `(.*?)`", PAGE)
    assert f"(Pdb) {shown}\n" in done.stdout
    assert "test_acc" in done.stdout


def test_every_recipe_is_short_and_has_its_command() -> None:
    assert len(COMMANDS) == 1 + len(GUESTS) + len(OTHERS) + 1
    assert len(GUESTS) == 7
    assert all(len(code.splitlines()) <= 60 for code in FILES.values())
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert len(re.findall(r"^\| \[.+?\]\(#.+?\) \|", PAGE, re.MULTILINE)) == len(headings) == 10
