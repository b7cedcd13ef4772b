"""A loss or a gradient that is not finite: where, when, what was before; or a step that is left out."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ablab.callbacks.nonfinite import NonFinite
from ablab.data.batch import Batch
from ablab.errors import DIVERGED, Diverged, Stopped
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run import signals
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train
from ablab.tasks.task import Task

Start = Callable[..., SimpleNamespace]
WORDS = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=5", "trainer.log_every_n_steps=1"]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Do something to the task and its batch before a step."""

    def prepare(step: int, change: Callable[[Task, Batch], Batch]) -> None:
        original = Task.training_step

        def training_step(self: Task, batch: Batch, batch_idx: int) -> Tensor:
            return original(self, change(self, batch) if self.global_step == step else batch, batch_idx)

        monkeypatch.setattr(Task, "training_step", training_step)

    return prepare


def with_nan(task: Task, batch: Batch) -> Batch:
    inputs = batch.inputs.clone()
    inputs[0, 0, 0, 0] = math.nan
    return batch._replace(inputs=inputs)


def with_infinite_gradient(task: Task, batch: Batch) -> Batch:
    weight = task.model.get_parameter("blocks.1.convs.0.weight")
    handle = weight.register_hook(lambda gradient: handle.remove() or torch.full_like(gradient, math.inf))
    return batch


def with_a_wild_weight(task: Task, batch: Batch) -> Batch:
    with torch.no_grad():
        task.model.get_parameter("blocks.1.convs.0.weight").fill_(1e38)
    return batch


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (with_a_wild_weight, r"the loss is nan; the first output that is not finite is that of model\.blocks\.1\."),
        (
            with_infinite_gradient,
            r"the loss is [\d.]+, its gradient inf; all outputs are finite, and the first gradient that is not finite "
            r"is that of model\.blocks\.1\.convs\.0\.weight",
        ),
    ],
)
def test_a_run_that_diverges_says_where_and_when_and_keeps_what_it_had(
    run: Start, at_step: Callable[..., Any], tmp_path: Path, change: Any, where: str
) -> None:
    at_step(3, change)
    with pytest.raises(
        Diverged, match=rf"^step 3 \(epoch 0\): {where}.*\n  The last finite step had loss [\d.]+, grad"
    ):
        run(*WORDS)
    [folder] = (tmp_path / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "diverged"
    assert record["error"].startswith("Diverged: step 3 (epoch 0): ")
    assert (folder / "metrics.csv").read_text().count("\n") == 4, "the header and the three steps before it"


def test_inputs_that_are_not_finite_are_named(run: Start, at_step: Callable[..., Any]) -> None:
    at_step(0, lambda task, batch: with_nan(task, batch))

    def keep(self: NonFinite, trainer: Any, pl_module: Any, batch: Batch, *rest: Any) -> None:
        self.batch = with_nan(pl_module, batch)

    original = NonFinite.on_train_batch_start
    NonFinite.on_train_batch_start = keep  # type: ignore[method-assign]
    try:
        with pytest.raises(
            Diverged, match=r"its inputs are not finite.\n  The last finite step had none: it was the first"
        ):
            run(*WORDS)
    finally:
        NonFinite.on_train_batch_start = original  # type: ignore[method-assign]


def test_a_step_that_is_left_out_changes_neither_weights_nor_averages(
    run: Start, at_step: Callable[..., Any], last_weights: Callable[..., Any]
) -> None:
    words = ["trainer=cpu", "trainer.max_epochs=1", "scheduler=constant", "trainer.log_every_n_steps=1"]
    four = last_weights(run(*words, "trainer.limit_train_batches=4").folder)
    at_step(4, with_nan)
    done = run(*words, "trainer.limit_train_batches=5", "callbacks.nonfinite.skip=1")
    assert "train/skipped_steps" in (done.folder / "metrics.csv").read_text()
    five = last_weights(done.folder)
    assert all(torch.equal(value, five[name]) for name, value in four.items())
    assert any("running_mean" in name for name in four)
    with pytest.raises(Diverged):
        run(*words, "trainer.limit_train_batches=5")


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_run_that_left_a_step_out_goes_on_with_the_same_rows(
    run: Start, at_step: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: int
) -> None:
    at_step(1, with_nan)
    words = [*WORDS, "callbacks.nonfinite.skip=3"]
    expected = (run(*words).folder / "metrics.csv").read_text()
    assert expected.count(",inf,") + expected.count(",nan,") >= 1
    original = Task.on_train_batch_start

    def stop(self: Task, *arguments: Any) -> None:
        if self.trainer.fit_loop.batch_idx == stopped:
            signals.requested = signal.SIGTERM
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "on_train_batch_start", stop)
        with pytest.raises(Stopped):
            run(*words, f"output_dir={tmp_path}/stopped")
    signals.requested = None
    [folder] = (tmp_path / "stopped").iterdir()
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    assert (folder / "metrics.csv").read_text() == expected


def test_the_rate_is_lower_after_a_step_that_was_left_out(
    run: Start, at_step: Callable[..., Any], last_weights: Callable[..., Any]
) -> None:
    at_step(0, with_infinite_gradient)
    words = ["trainer.max_steps=2", "trainer.limit_train_batches=2", "norm=groupnorm", "scheduler=constant"]
    words += [
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "optimizer.weight_decay=0",
        "callbacks.nonfinite.skip=1",
    ]
    folders = [
        run("trainer.log_every_n_steps=1", *words, *more).folder
        for more in (
            ["optimizer.lr=0"],
            ["optimizer.lr=0.1"],
            ["optimizer.lr=0.1", "callbacks.nonfinite.lr_factor=0.5"],
        )
    ]
    begin, whole, half = map(last_weights, folders)
    rates = [row["train/lr"] for row in read_rows(folders[2]) if "train/lr" in row]
    assert rates == pytest.approx([0.1, 0.05]), "what is logged is the rate that was taken"
    for name, value in begin.items():
        torch.testing.assert_close(half[name] - value, 0.5 * (whole[name] - value), rtol=1e-3, atol=1e-6)
    assert not torch.equal(begin["conv1.weight"], half["conv1.weight"])


def test_watching_changes_nothing(run: Start) -> None:
    hashes = []
    for words in (
        [],
        ["callbacks.nonfinite=null"],
        ["callbacks.nonfinite.skip=3", "callbacks.nonfinite.lr_factor=0.5"],
    ):
        record = json.loads((run(*WORDS, "model=rnn", "model.dropout=0.2", *words).folder / "run.json").read_text())
        hashes.append(record["weights_sha256"])
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_the_command_says_it_once_and_leaves_with_its_own_exit_code(
    command: Callable[..., Any], processes: int
) -> None:
    many = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"] if processes == 2 else []
    done = command("optimizer.lr=1e30", "trainer.max_epochs=1", "logger=csv", *many)
    assert done.returncode == DIVERGED, done.stderr
    assert done.stderr.count("error: step ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"skip": -1}, "skip=-1: 0 or more"), ({"lr_factor": 0.0}, "lr_factor=0.0: a factor above 0 and at most 1")],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NonFinite(**settings)
