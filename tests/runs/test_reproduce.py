"""A run made again from its folder: equal to the bit, or the first step at which they part."""

from __future__ import annotations

import csv
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ablab.errors import Diverged
from ablab.lab.config.errors import readable_errors
from ablab.lab.run.compare import compare, format_comparison

Start = Callable[..., SimpleNamespace]
Command = Callable[..., Any]
Again = Callable[..., SimpleNamespace]
SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce.py"
SHORT = [
    *("trainer=cpu", "logger=csv", "trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.max_steps=8"),
    *("trainer.log_every_n_steps=1", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2"),
]
MODELS = {
    "resnet": ["data/augment=crop_flip", "data.augment.mixup=0.3", "logger=wandb"],
    "transformer": ["model=transformer", "data=text", "data.context_length=16", "model.dropout=0.1"],
    "rnn": ["model=rnn", "model.dropout=0.1"],
}


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Again:
    """Run the script in this process, as `python scripts/reproduce.py WORDS`."""

    def start(*words: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        capsys.readouterr()
        main = runpy.run_path(str(SCRIPT), run_name="reproduce")["main"]
        try:
            with readable_errors():
                code = main()
        except SystemExit as left:
            code = left.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return start


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def typed(done: SimpleNamespace) -> Path:
    """The folder of a run, as if its words had been typed."""
    change_json(done.folder / "run.json", overrides=list(done.words))
    return done.folder


def change_json(file: Path, **facts: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


@pytest.mark.parametrize("name", ["resnet", pytest.param("transformer", marks=pytest.mark.thorough), "rnn"])
def test_a_run_is_reproduced_to_the_bit_and_a_change_is_found_where_it_begins(
    run: Start, again: Again, tmp_path: Path, name: str
) -> None:
    folder = typed(run(*SHORT, *MODELS[name]))
    same = again(str(folder))
    assert same.code == 0, same.out + same.err
    best = json.loads((folder / "run.json").read_text())["weights_sha256"]["best"]
    assert f"equal to the bit: {len(rows(folder))} rows, " in same.out
    assert f"final metrics and weights best {best[:12]}…, last " in same.out

    other = again(str(folder), "optimizer.lr=0.02", f"output_dir={tmp_path}/changed")
    assert other.code == 4, other.err
    assert "not as it was: optimizer.lr: " in other.out
    assert " then, 0.02 now\n" in other.out
    [changed] = (tmp_path / "changed").iterdir()
    assert "lr: 0.02" in (changed / "config.yaml").read_text()
    before, after = rows(folder), rows(changed)
    first = next(i for i in range(len(before)) if before[i] != after[i])
    column = next(name for name in sorted(before[first]) if before[first][name] != after[first][name])
    assert f"they part first at step {before[first]['step']}: {column} was {before[first][column]} and" in other.out
    assert "weights last: " in other.out


def test_what_depends_on_a_changed_value_changes_with_it(run: Start, again: Again, tmp_path: Path) -> None:
    folder = typed(run())
    done = again(str(folder), "seed=1", "norm=groupnorm", f"output_dir={tmp_path}/changed")
    assert done.code == 4, done.err
    [changed] = (tmp_path / "changed").iterdir()
    other = run("seed=1", "norm=groupnorm").folder
    assert compare(other, changed).equal
    for line in ("seed: 0 then, 1 now", "data.seed: 0 then, 1 now", "norm._target_: ablab.norms.BatchNorm then, "):
        assert f"not as it was: {line}" in done.out


@pytest.mark.slow
def test_a_run_of_two_processes_is_reproduced_to_the_bit(command: Command, tmp_path: Path) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    made = command(*SHORT[1:], *two, "norm=syncbatchnorm")
    assert made.returncode == 0, made.stderr
    [folder] = (tmp_path / "runs").iterdir()
    done = command(str(folder), script="scripts/reproduce.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal to the bit") == 1


def test_what_has_changed_since_is_said(run: Start, again: Again, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 300)
    folder = run("model=rnn", "data=text", f"data.path={text}", "data.context_length=8").folder
    record = json.loads((folder / "run.json").read_text())
    change_json(folder / "run.json", identity={**record["identity"], "code": "0" * 16}, git_commit="0123abc")
    environment = json.loads((folder / "environment.json").read_text())
    packages = {**environment["packages"], "torch": "0.0.1"}
    change_json(folder / "environment.json", python="3.0.0", processor="an abacus", packages=packages)
    text.write_text("to see or not to see, that is the question. " * 300)
    done = again(str(folder))
    assert done.code == 4, done.err
    for line in (
        f"not as it was: the code: {'0' * 16} (commit 0123abc) then, ",
        "not as it was: python: 3.0.0 then, ",
        "not as it was: processor: an abacus then, ",
        f"not as it was: torch: 0.0.1 then, {torch.__version__} now",
        "not as it was: the data: ",
        "they part first at step 0: ",
    ):
        assert line in done.out


def test_the_threads_of_the_run_are_taken_and_said(run: Start, again: Again) -> None:
    threads = torch.get_num_threads()
    folder = run().folder
    try:
        torch.set_num_threads(threads + 1)
        done = again(str(folder))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert done.code == 0
    assert f"threads: {threads}, as in the run, instead of {threads + 1}" in done.out


def test_a_run_that_was_ended_from_outside_is_compared_as_far_as_it_goes(run: Start, again: Again) -> None:
    folder = run(*SHORT).folder
    change_json(folder / "run.json", status="stopped", metrics={}, weights_sha256={})
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:4]) + lines[4][:5])  # the last one was cut off
    done = again(str(folder))
    assert done.code == 0
    assert "the run is stopped: it is compared as far as it goes" in done.out
    assert "equal to the bit: 3 rows, " in done.out
    assert "values, as far as the run goes" in done.out
    assert "final metrics and weights" not in done.out, "they have not been compared"


def test_a_run_that_diverged_has_to_diverge_again(run: Start, again: Again, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        run(*SHORT, "optimizer.lr=1e30")
    [folder] = (tmp_path / "runs").iterdir()
    words = [*SHORT, f"output_dir={tmp_path}/runs", "optimizer.lr=1e30"]
    change_json(folder / "run.json", overrides=words)
    same = again(str(folder))
    assert same.code == 0, same.out + same.err
    assert "equal to the bit: 1 rows, " in same.out
    assert "both have diverged" in same.out
    other = again(str(folder), "optimizer.lr=0.02")
    assert other.code == 4
    assert "the run: diverged then, finished now" in other.out


def test_the_program_refuses_what_is_no_runs_folder(command: Command) -> None:
    done = command("nowhere", script="scripts/reproduce.py")
    assert done.returncode == 2
    assert done.stderr == "error: nowhere: it is not a run's folder; there is no run.json in it\n"


def test_words_that_change_nothing_are_refused(run: Start, again: Again) -> None:
    done = run()
    untyped = again(str(done.folder), "optimizer.lr=1").err
    assert untyped.startswith(f"error: optimizer.lr=1: {done.folder} was made in a program, not by train.py, so only ")
    folder = typed(done)
    for word in ("optimizer.lr", "=1"):
        assert again(str(folder), word).err == f"error: {word}: key=value is needed, as on the command line\n"
    assert again(str(folder), "optimizer.rate=1").err.startswith("error: optimizer.rate: there is no such key; ")
    assert again(str(folder), "optimizer.lr=[").err.startswith("error: optimizer.lr=[: not of the form key=value (")
    assert again(str(folder), "norm=grupnorm").err.startswith("error: norm=grupnorm: there is no such choice; did you")
    assert again(str(folder), "resume=runs/x").err.startswith("error: resume=runs/x: a run is made again from its ")
    assert not (folder.parent / "reproductions").exists()


def test_a_folder_with_which_nothing_can_be_compared_is_refused_before_training(run: Start, again: Again) -> None:
    folder = run().folder
    for name, content, message in (
        ("run.json", "{", ": its run.json cannot be read (Expecting property name"),
        ("run.json", "{}", ": its run.json is not what a run writes (it lacks data, git_commit, id, identity, "),
        ("environment.json", "[]", ": its environment.json is not what a run writes (it lacks accelerators, cuda, "),
        ("config.yaml", "- 1\n", ": its config.yaml cannot be read ("),
        ("metrics.csv", "step,a\n0,what\n", ": its metrics.csv is not what a run writes (could not convert string"),
    ):
        kept = (folder / name).read_text()
        (folder / name).write_text(content)
        done = again(str(folder))
        (folder / name).write_text(kept)
        assert done.code == 2
        assert done.err.startswith(f"error: {folder}{message}")
        assert done.err.count("bring ") == 1
    os.remove(folder / "metrics.csv")
    change_json(folder / "run.json", status="failed")
    done = again(str(folder))
    assert done.err == f"error: {folder}: the run is failed and has logged nothing; there is nothing to compare\n"
    (folder / "run.json").unlink()
    assert again(str(folder)).err == f"error: {folder}: it is not a run's folder; there is no run.json in it\n"
    assert not (folder.parent / "reproductions").exists()


def test_a_single_changed_value_is_found(run: Start) -> None:
    words = ("trainer.max_steps=3", "trainer.limit_train_batches=3")
    first, second = run(*words).folder, run(*words).folder
    found = compare(first, second)
    assert found.equal
    assert format_comparison(found).startswith("equal to the bit: ")
    file = second / "metrics.csv"
    lines = file.read_text().splitlines()
    step, *rest = lines[2].split(",")
    place = next(i for i, value in enumerate(rest) if i > 0 and value)
    rest[place] = str(float(rest[place]) + 1e-9)
    file.write_text("\n".join([*lines[:2], ",".join([step, *rest]), *lines[3:]]) + "\n")
    found = compare(first, second)
    assert not found.equal
    assert found.first is not None
    assert found.first[:2] == (int(step), lines[0].split(",")[place + 1])
    assert found.num_different == 1
    file.write_text("\n".join(lines[:3]) + "\n")
    missing = compare(first, second)
    assert missing.first is not None, "rows that are missing"
    assert " and is none; " in format_comparison(missing)


def test_nan_equals_nan_and_every_end_is_compared(run: Start) -> None:
    first, second = run().folder, run().folder
    for folder in (first, second):
        lines = (folder / "metrics.csv").read_text().splitlines()
        (folder / "metrics.csv").write_text("\n".join([f"{lines[0]},z", *(f"{line},nan" for line in lines[1:])]) + "\n")
    assert compare(first, second).equal
    record = json.loads((second / "run.json").read_text())
    change_json(
        second / "run.json",
        metrics={**record["metrics"], "test/loss": None},
        weights_sha256={**record["weights_sha256"], "best": "0" * 64},
    )
    found = compare(first, second)
    assert (found.equal, found.first) == (False, None)
    loss, best = record["metrics"]["test/loss"], record["weights_sha256"]["best"]
    assert found.others == [
        f"metrics test/loss: {loss} then, none now",
        f"weights best: {best[:12]}… then, {'0' * 12}… now",
    ]
