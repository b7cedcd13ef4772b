"""The loop over batches does what Lightning's does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor

from ablab.lab.fast_loop import TrainingEpoch
from ablab.lab.loggers.csv_file import read_rows
from ablab.tasks.task import Task

Start = Callable[..., SimpleNamespace]
WORDS = ("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=2")
HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


class Listener(Callback):
    """Notes every hook that is called, in which step."""

    heard: list[tuple[str, int]]


def noting(name: str) -> Callable[..., None]:
    def hook(self: Listener, trainer: Any, *arguments: Any) -> None:
        self.heard.append((name, trainer.global_step))

    return hook


for name in HOOKS:
    setattr(Listener, name, noting(name))


class Logging(Callback):
    """Logs in a hook, as a callback of a fork may."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        pl_module.log("own/step", float(trainer.global_step))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("trainer.gradient_clip_val=0.1", "data.micro_batch_size=16"),
        ("trainer.precision=bf16-mixed", "trainer.val_check_interval=2"),
        ("data/augment=crop_flip", "data=synthetic_images", "data.num_samples=300", "optimizer=adamw"),
    ],
)
def test_it_calls_the_hooks_that_lightning_calls_and_finds_the_same_to_the_bit(
    run: Start, last_weights: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    listening = "+callbacks.listener._target_=tests.test_loop.Listener"

    def done(*more: str) -> tuple[list[tuple[str, int]], dict[str, Tensor], str]:
        heard: list[tuple[str, int]] = []
        monkeypatch.setattr("tests.test_loop.Listener.heard", heard, raising=False)
        folder = run(*WORDS, *words, listening, "+callbacks.own._target_=tests.test_loop.Logging", *more).folder
        return heard, last_weights(folder), (folder / "metrics.csv").read_text()

    ours = done()
    monkeypatch.setattr(TrainingEpoch, "advance", _TrainingEpochLoop.advance)
    theirs = done()
    assert ours[0] == theirs[0]
    assert {name for name, _ in ours[0]} >= {"on_before_backward", "on_before_zero_grad", "on_train_batch_end"}
    assert all(torch.equal(value, ours[1][name]) for name, value in theirs[1].items())
    assert ours[2] == theirs[2]
    assert "own/step" in ours[2]


def test_a_module_with_an_optimizer_step_of_its_own_gets_it(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    original, called = Task.optimizer_step, []

    def optimizer_step(self: Task, *arguments: Any, **settings: Any) -> None:
        called.append(self.trainer.global_step)
        original(self, *arguments, **settings)

    monkeypatch.setattr(Task, "optimizer_step", optimizer_step, raising=False)
    run(*WORDS)
    assert called == list(range(8))


def test_hooks_of_an_instance_and_schedules_of_epochs_count(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = LambdaCallback(on_train_batch_end=lambda trainer, *arguments: calls.append(trainer.global_step))
    monkeypatch.setattr(Task, "configure_callbacks", lambda self: [own])

    def configure_optimizers(self: Task) -> Any:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    monkeypatch.setattr(Task, "configure_optimizers", configure_optimizers)
    folder = run(*WORDS, "trainer.log_every_n_steps=1").folder
    assert calls == list(range(1, 9))
    rates = [row["train/lr"] for row in read_rows(folder) if "train/lr" in row]
    assert rates == [1.0] * 4 + [0.5] * 4


def test_a_module_can_leave_the_rest_of_an_epoch_out(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    original, begun = Task.on_train_batch_start, []

    def on_train_batch_start(self: Task, batch: Any, batch_idx: int) -> Any:
        original(self, batch, batch_idx)
        begun.append(batch_idx)
        return -1 if batch_idx == 2 else None

    monkeypatch.setattr(Task, "on_train_batch_start", on_train_batch_start)
    run(*WORDS)
    assert begun == [0, 1, 2] * 2


def test_what_a_step_observed_can_be_monitored_in_any_step(run: Start) -> None:
    early = "+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: train/loss}"
    run(*WORDS, "trainer.log_every_n_steps=1000", early)


def test_on_a_version_that_was_not_tested_lightnings_own_loop_finds_the_same_to_the_bit(
    run: Start, last_weights: Callable[..., dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = last_weights(run(*WORDS).folder)
    monkeypatch.setattr(lightning, "__version__", "9.0.0")
    monkeypatch.setattr(TrainingEpoch, "__init__", lambda *_, **__: pytest.fail("it was made"))
    with pytest.warns(UserWarning, match=r"Lightning 9.0.0: the faster training loop is tested with 2.6.x only"):
        found = last_weights(run(*WORDS).folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
