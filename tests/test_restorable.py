"""A checkpoint that is sound but does not fit is passed over for the one before; if none fits, that is one message."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tests.runs.test_resume import result

from ablab.errors import ConfigError, RunError
from ablab.lab.evaluate import evaluate
from ablab.lab.run.checkpoint_files import list_checkpoints, newest_valid, read, read_weights, write, write_weights
from ablab.lab.run.folder import read_config
from ablab.lab.run.restorable import Unfit, check_checkpoint
from ablab.lab.run.resume import resume_config
from ablab.lab.train import Parts, assemble, train

Start = Callable[..., SimpleNamespace]
Stop = Callable[..., Path | None]
WORDS = ["trainer=cpu", "trainer.max_epochs=3", "trainer.limit_train_batches=2", "trainer.max_steps=6"]
WORDS += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]


def put(state: Any, place: str, value: Any) -> None:
    """Set, or with `...` remove, what is at a place such as loops/fit_loop/epoch_progress."""
    *parents, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    for key in parents:
        state = state[key]
    if value is ...:
        del state[last]
    else:
        state[last] = value


def change(file: Path, place: str, value: Any) -> None:
    """Change a checkpoint and renew its hash."""
    state = read(file)
    put(state, place, value)
    write(state, file)


def resume(folder: Path) -> None:
    train(resume_config(OmegaConf.create({"resume": str(folder), "trust": None})))


@pytest.fixture(scope="module")
def parts_of_module() -> dict[str, Any]:
    return {}


@pytest.fixture
def sound(run: Start, parts_of_module: dict[str, Any]) -> SimpleNamespace:
    """What a run is made of, a file's name and the state in it; made once."""
    if not parts_of_module:
        done = run(*WORDS[:-2], "optimizer=adamw")
        parts_of_module["parts"] = assemble(read_config(done.folder))
        parts_of_module["path"] = path = list_checkpoints(done.folder / "checkpoints")[-1]
        parts_of_module["state"] = read(path)
    made = parts_of_module
    return SimpleNamespace(parts=made["parts"], path=made["path"], state=copy.deepcopy(made["state"]))


def checker(parts: Parts) -> Callable[[Path, Any], None]:
    return partial(check_checkpoint, task=parts.task, trainer=parts.trainer, data=parts.data)


PROGRESS = "loops/fit_loop/epoch_loop.batch_progress"
STEPS = "loops/fit_loop/epoch_loop.automatic_optimization.optim_progress/optimizer/step/total/completed"
FIRST = "state_dict/model.conv1.weight"


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (
            FIRST,
            torch.zeros(3, 3),
            r"state_dict: model\.conv1\.weight has shape \(3, 3\), and \(16, 1, 3, 3\)",
        ),
        (FIRST, ..., r"state_dict: model\.conv1\.weight is missing"),
        (FIRST, "weights", r"state_dict: model\.conv1\.weight is no tensor"),
        ("state_dict/model.more", torch.zeros(1), r"state_dict: model\.more is unknown"),
        ("state_dict", [1], "state_dict is .*, and a mapping is needed"),
        ("state_dict", ..., "state_dict is missing"),
        ("epoch", "one", "epoch is 'one', and a whole number, 0 or more is needed"),
        ("epoch", -1, "epoch is -1"),
        ("global_step", math.nan, "global_step is nan"),
        ("global_step", 10**30, "global_step is 1"),
        ("global_step", 3, "it is of step 3 .*, unlike its name"),
        ("global_step", True, "global_step is True"),
        ("num_rows", -1, "num_rows is -1, and a whole number, 0 or more is needed"),
        ("num_rows", "2", "num_rows is '2'"),
        ("num_rows", ..., "num_rows is missing"),
        ("loops", ..., "loops is missing"),
        ("loops/fit_loop", {}, r"loops\.fit_loop\..* is missing"),
        (PROGRESS, 3, "batch_progress is 3, and a mapping is needed"),
        (f"{PROGRESS}/current/ready", "3", r"batch_progress\.current\.ready is '3'"),
        (f"{PROGRESS}/is_last_batch", 1, "is_last_batch is 1, and true or false is needed"),
        (STEPS, 1, "1 completed"),
        ("loops/fit_loop/state_dict/combined_loader", [3], "combined_loader is no list of mappings"),
        ("callbacks", ..., "callbacks is missing"),
        ("callbacks/Checkpoints", ..., r"callbacks\.Checkpoints is missing"),
        ("callbacks/Checkpoints/best_score", "high", "best_score is 'high'"),
        ("callbacks/Checkpoints/best_score", math.nan, "best_score is nan"),
        ("callbacks/Checkpoints/best_score", ..., r"best_score is 'missing'"),
        ("callbacks/Checkpoints/phase", "training", "it is of step 6 .training, 6 completed., unlike its name"),
        ("callbacks/Checkpoints/phase", None, "phase is None, and a text is needed"),
        ("callbacks/NonFinite/skipped", 3, r"callbacks\.NonFinite\.skipped is 3, and a list is needed"),
        ("callbacks/NonFinite", {}, r"callbacks\.NonFinite\.\w+ is missing"),
        ("optimizer_states", [], "it has 0 optimizers and 1 schedules"),
        ("optimizer_states", {}, "optimizer_states is {}, and a list is needed"),
        ("optimizer_states/0/param_groups", [], "param_groups is .*, and a list of 2 is needed"),
        ("optimizer_states/0/param_groups/0/lr", "fast", r"param_groups\[0\]\.lr is 'fast', and a finite number"),
        ("optimizer_states/0/param_groups/0/lr", math.inf, r"param_groups\[0\]\.lr is inf"),
        ("optimizer_states/0/param_groups/0/betas", [0.9], r"betas is \[0\.9\], and a list of 2 is needed"),
        ("optimizer_states/0/param_groups/1/params", [0], r"params is \[0\], and a list of \d+ is needed"),
        ("optimizer_states/0/state/0/exp_avg", torch.zeros(2), r"exp_avg is of shape \(2,\), and a tensor of shape \("),
        ("optimizer_states/0/state/0/exp_avg", ..., "exp_avg is missing"),
        ("optimizer_states/0/state/99", {}, r"state\[99\] is of a parameter that the model does not have"),
        ("lr_schedulers", [], "it has 1 optimizers and 0 schedules"),
        ("lr_schedulers/0/last_epoch", "4", "last_epoch is '4'"),
        ("lr_schedulers/0/base_lrs", [0.1], "base_lrs is .*, and a list of 2 is needed"),
        ("train_metrics", [], "train_metrics is no list with an entry for each process"),
        ("train_metrics", [{}], r"train_metrics\[0\]\.\w+ is missing"),
        ("train_metrics/0/accuracy/updates", -3, "updates is -3"),
        ("train_metrics/0/accuracy/state", {}, r"train_metrics\[0\]\.accuracy\.state\.\w+ is missing"),
        ("Digits", {"fingerprint": 3}, r"Digits\.fingerprint is 3, and a text is needed"),
    ],
)
def test_a_state_that_does_not_fit_is_told_by_its_place(
    sound: SimpleNamespace, place: str, value: Any, problem: str
) -> None:
    put(sound.state, place, value)
    with pytest.raises(Unfit, match=problem):
        checker(sound.parts)(sound.path, sound.state)


@pytest.mark.parametrize("state", [[], "state", None, {}, torch.zeros(3)])
def test_content_that_is_no_state_at_all_does_not_fit(sound: SimpleNamespace, state: Any) -> None:
    with pytest.raises(Unfit):
        checker(sound.parts)(sound.path, state)


@pytest.mark.parametrize(
    "words",
    [
        *([f"optimizer={name}"] for name in ("lion", "muon", "decoupled_sgd", "schedulefree_adamw")),
        ["optimizer=schedulefree_sgd", "callbacks=recalibration"],
        ["scheduler=one_cycle", "callbacks=ema", "callbacks.ema.decay=0.5", "task.per_class=true"],
        ["model=transformer", "data=text", "data.context_length=16", "scheduler=multistep"],
        [
            "model=rnn",
            "+callbacks/measure=[drift,norms]",
            "optimizer=sgd",
            "optimizer.nesterov=false",
            "optimizer.momentum=0",
        ],
        ["norm=spectralnorm", "callbacks=speedrun", "scheduler=triangular", "optimizer=sgd"],
    ],
    ids=" ".join,
)
def test_what_a_run_writes_fits_and_nothing_changes_by_looking(run: Start, words: list[str]) -> None:
    done = run("data.batch_size=16", "trainer.limit_train_batches=2", "trainer.max_steps=2", *words)
    parts = assemble(read_config(done.folder))
    before = copy.deepcopy(parts.task.state_dict())
    for path in list_checkpoints(done.folder / "checkpoints"):
        state = read(path)
        checker(parts)(path, state)
        assert not list(find_differences(state, read(path)))
    after = parts.task.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # and the look is one: another shape in the optimizer is seen
    values = next((v for v in state["optimizer_states"][0]["state"].values() if v), None)
    tensors = [key for key, value in (values or {}).items() if isinstance(value, torch.Tensor)]
    if values is not None and tensors:
        values[tensors[-1]] = torch.zeros(7, 7, 7)
        with pytest.raises(Unfit, match=r"optimizer_states\[0\]\.state"):
            checker(parts)(path, state)


def find_differences(a: Any, b: Any) -> Any:
    """The leaves in which two states differ."""
    if isinstance(a, dict):
        for key in a.keys() | b.keys():
            yield from find_differences(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            yield from find_differences(x, y)
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
        yield a, b


def test_a_run_falls_back_to_the_checkpoint_before_and_finds_the_same(
    run: Start, stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = result(run(*WORDS).folder)
    folder = stop("training_step", 5, *WORDS)
    assert folder is not None
    newest = list_checkpoints(folder / "checkpoints")[-1]
    change(newest, FIRST, torch.zeros(3, 3))
    capsys.readouterr()
    resume(folder)
    said = capsys.readouterr().err
    assert f"warning: {newest}: it does not fit the code (state_dict: model.conv1.weight has shape (3, 3), and" in said
    assert "falling back to the previous checkpoint" in said
    assert newest.with_suffix(".broken").exists()
    assert result(folder) == expected


def test_checkpoints_that_are_no_files_of_ours_are_passed_over(stop: Stop, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stop("training_step", 5, *WORDS)
    assert folder is not None
    paths = [folder / "checkpoints" / f"{step:08d}-training.ckpt" for step in range(6, 11)]
    (paths[0] / "below").mkdir(parents=True)
    paths[1].write_text("")
    paths[2].write_text("a text of some length " * 100)
    paths[3].symlink_to(paths[3].name)
    paths[4].symlink_to("/proc/self/mem")
    older = folder / "checkpoints" / "00000001-training.ckpt"
    older.mkdir()
    resume(folder)
    said = capsys.readouterr().err
    for path in paths:
        assert re.search(rf"{path}: .*; falling back to the previous checkpoint", said)
        assert path.with_suffix(".broken").is_symlink() or path.with_suffix(".broken").exists()
    assert str(older) not in said
    assert older.is_dir(), "it is no file of the run, and nothing removes it"
    assert result(folder)["status"] == "finished"


def test_where_no_state_fits_it_is_one_message_and_nothing_is_written(
    stop: Stop, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stop("training_step", 5, *WORDS)
    assert folder is not None
    for path in list_checkpoints(folder / "checkpoints"):
        change(path, FIRST, torch.zeros(3, 3))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ConfigError, match=r"no checkpoint of this run fits what the code now makes .*; use"):
        resume(folder)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_last_weights_are_those_of_the_newest_checkpoint_that_fits(
    run: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(*WORDS).folder
    newest = list_checkpoints(folder / "checkpoints")[-1]
    change(newest, FIRST, torch.zeros(3, 3))
    evaluate(folder, weights="last")
    assert f"{newest}: it does not fit the code (conv1.weight has shape (3, 3)" in capsys.readouterr().err
    for path in list_checkpoints(folder / "checkpoints"):
        change(path, "state_dict", "none")
    with pytest.raises(ConfigError, match="no checkpoint of this run fits what the code now makes"):
        evaluate(folder, weights="last")


def test_best_weights_of_another_model_are_refused_before_training_and_scoring(run: Start, stop: Stop) -> None:
    folder = stop("training_step", 5, *WORDS)
    assert folder is not None
    best = folder / "checkpoints" / "best.safetensors"
    write_weights({**read_weights(best), "conv1.weight": torch.zeros(3, 3)}, best)
    for entry, kind in ((evaluate, ConfigError), (resume, RunError)):
        with pytest.raises(
            kind, match=r"best\.safetensors: its weights are not of the model .*conv1\.weight has shape"
        ):
            entry(folder)


def test_a_state_of_another_run_is_passed_over_whatever_its_id_is(tmp_path: Path) -> None:
    said: list[str] = []
    for step, state in enumerate(({"run": "a"}, {"run": 3}, {"run": ["a"]}, [1], {})):
        write(state, tmp_path / f"{step:08d}-end.ckpt")
    found = newest_valid(tmp_path, said.append, run="a")
    assert found is not None
    assert found[0].name == "00000000-end.ckpt"
    assert [line.count("it is no checkpoint of this run") for line in said] == [1, 1, 1, 1]
