"""README: its commands run; its tree is the repository's, its list of choices (docs/choices.md) the folders'."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from tests import forked
from tests.polling import LIMIT

from ablab.lab.train import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CHOICES = (ROOT / "docs" / "choices.md").read_text()
# whose commands have no tests of their own
PAGES = ["index", "tasks", "guests", "runs", "speed", "terminal", "browse"]


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


COMMANDS = commands(README)
SHOWN = dict.fromkeys([*COMMANDS, *(c for page in PAGES for c in commands((ROOT / "docs" / f"{page}.md").read_text()))])
# tests/test_new.py, in copies; tests/runs/test_predict.py, with files to predict
ELSEWHERE = ("my_norm", "predict.py")
PROGRAMS = [line for line in SHOWN if line.startswith("python ") and not any(word in line for word in ELSEWHERE)]
FOLDER = "runs/2026-11-23_14-03-22_run"  # stands for a run's
# A test takes a step of each: what is tried is that the command composes, starts and ends well.
SHORT = [
    "trainer.max_steps=1",
    "trainer.log_every_n_steps=1",
    *(f"trainer.limit_{part}_batches=1" for part in ("train", "val", "test")),
]


TRAINING = [line for line in PROGRAMS if re.match(r"python train.py(?!.*( -m |ablation=|--help|=runs/))", line)]


@pytest.mark.parametrize("line", TRAINING)
def test_every_training_runs(config: Callable[..., DictConfig], tmp_path: Path, capsys: Any, line: str) -> None:
    """In this process: how a command starts and ends is tested with the others below."""
    train(config(*shlex.split(line)[2:], *SHORT, f"output_dir={tmp_path}"))
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has finished."""
    words, place = ("trainer=smoke", "logger=csv"), tmp_path_factory.mktemp("smoke")
    done = forked.run(ROOT / "train.py", words, folder=place, environment=os.environ, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    [run] = (place / "runs").iterdir()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in PROGRAMS if line not in TRAINING])
def test_every_other_command_runs(command: Callable[..., Any], tmp_path: Path, smoke: Path, line: str) -> None:
    _, script, *words = shlex.split(line)
    words = [word.replace(FOLDER, str(smoke)).replace("runs/norm_batch_size", "runs") for word in words]
    if "browse" in script:
        (tmp_path / "runs").mkdir()
        shutil.copytree(smoke, tmp_path / "runs" / smoke.name)
        words = ["--no-open", *(word for word in words if word != "--no-open")]
    alone = script != "train.py" or FOLDER in line or "--help" in words
    fewer = ["seed=0", "logger=csv"] if "-m" in words or " ablation=" in line else []  # tests/ablation has the others
    result = command(*words, *([] if alone else [*SHORT, *fewer]), script=script)
    changed = "reproduce" in script and len(words) > 1  # it says by how much the results part
    assert result.returncode == (4 if changed else 0), result.stderr
    assert result.stderr == ""


def test_the_readme_shows_commands_of_each_kind() -> None:
    assert "python train.py norm=groupnorm data.batch_size=8" in COMMANDS
    assert "make train" in COMMANDS
    assert "make test" in COMMANDS


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_the_tree_is_the_repositorys() -> None:
    tree = README.split("## Where things are")[1].split("```")[1].strip()
    paths = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / path).exists() for path in paths)
    rooms = {f"src/ablab/{path.name}/" for path in (ROOT / "src/ablab").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(paths), "every room has its line"


def choices(text: str) -> set[str]:
    """The words of a list; what stands in brackets, explains, or is a heading of it left out."""
    plain = re.sub(r"\[.*?\]\(.*?\)|\(.*?\)|`.*?`|[\w ]+:", "", text)
    return {part.strip(" .") for part in re.split("[,;]", plain)} & set(re.findall(r"\w+", plain))


# What somebody adds need not be named: --help shows it. So nothing is asked the other way round of all that is there.
@pytest.mark.parametrize("group", ["norm", "model", "data", "optimizer", "scheduler", "trainer"])
def test_every_choice_that_is_named_exists(group: str) -> None:
    [(groups, listed)] = re.findall(rf"^\| (.*`{group}`.*?) \| (.*) \|$", CHOICES, re.MULTILINE)
    names = {file.stem for room in re.findall(r"`(\w+)`", groups) for file in (ROOT / "conf" / room).glob("*.yaml")}
    assert len(choices(listed)) >= 3
    assert choices(listed) <= names


@pytest.mark.parametrize("group", ["norm", "data"])
def test_every_choice_that_has_a_page_is_named(group: str) -> None:
    page = (ROOT / "docs" / {"norm": "norms.md", "data": "data.md"}[group]).read_text()
    table = page.split(f"| `{group}=` |")[1].split("\n\n")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"\w+", row)}
    assert len(names) > 10
    assert all(re.search(rf"\b{name}\b", CHOICES) for name in names)


def test_its_results_are_those_of_the_page_of_results() -> None:
    rows = re.findall(r"^\| (?:resnet|transformer|rnn).*$", README, re.MULTILINE)
    assert len(rows) == 3
    assert set(rows) <= set((ROOT / "docs" / "results.md").read_text().splitlines())


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 110
