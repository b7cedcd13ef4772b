"""Options of Lightning's Trainer and its schedules do for a shipped task what Lightning's documentation says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tests.runs.test_resume import result
from torch import Tensor

from ablab.data.batch import Batch
from ablab.errors import ConfigError
from ablab.lab.loggers.csv_file import read_rows
from ablab.tasks.classification import Classification

Start = Callable[..., SimpleNamespace]
Stop = Callable[..., Path | None]
SHORT = ("trainer=cpu", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2", "trainer.log_every_n_steps=1")


class Watched(Classification):
    """Notes the sum of each training batch and a random number of each of its steps."""

    inputs: ClassVar[list[float]] = []
    drawn: ClassVar[list[float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.inputs.append(float(batch.inputs.double().square().sum()))
        self.drawn.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)


WATCHED = "task._target_=tests.test_lightning_options.Watched"


@pytest.fixture(autouse=True)
def _watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    Watched.inputs, Watched.drawn = [], []
    return


def rows_of(folder: Path, name: str) -> list[float]:
    values = [float(row[name]) for row in read_rows(folder) if name in row]
    assert values, f"{name} was not logged"
    return values


def test_accumulated_batches_train_like_one_large_batch(run: Start, last_weights: Callable[..., Any]) -> None:
    words = (*SHORT, "norm=groupnorm", "trainer.max_epochs=2")
    large = run(*words, "data.batch_size=32", "trainer.limit_train_batches=3").folder
    words = (*words, "data.batch_size=8", "trainer.limit_train_batches=12", "trainer.accumulate_grad_batches=4")
    small = run(*words).folder
    expected = last_weights(large)
    for name, weight in last_weights(small).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert rows_of(small, "train/loss") == pytest.approx(rows_of(large, "train/loss"), rel=1e-4)
    assert rows_of(small, "train/lr") == rows_of(large, "train/lr")
    assert json.loads((small / "run.json").read_text())["batch_sizes"] == {"optimizer": 32, "forward": 8, "norm": 1}


def test_the_last_step_of_an_epoch_logs_the_mean_of_the_batches_it_has(run: Start) -> None:
    words = (*SHORT, "optimizer.lr=0", "norm=groupnorm", "trainer.max_epochs=1", "data.batch_size=8")
    each = rows_of(run(*words, "trainer.limit_train_batches=5").folder, "train/loss")
    steps = run(*words, "trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=3").folder
    assert rows_of(steps, "train/loss") == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 2], rel=1e-5)


def test_the_batches_of_one_step_draw_different_random_numbers(run: Start) -> None:
    run(*SHORT, WATCHED, "trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.accumulate_grad_batches=2")
    assert len(set(Watched.drawn)) == 8


def test_overfitting_repeats_the_same_batches(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run(*SHORT, WATCHED, "trainer.overfit_batches=2", "trainer.max_epochs=3", "data/augment=crop_flip")
    first, second, *rest = Watched.inputs
    assert first != second
    assert rest == [first, second] * 2
    assert "trial: trainer.overfit_batches=2" in capsys.readouterr().err


def test_a_batch_is_learned_by_heart_in_the_debug_preset(run: Start) -> None:
    folder = run("debug=overfit", "trainer=cpu", "trainer.max_epochs=40", "trainer.log_every_n_steps=1").folder
    assert rows_of(folder, "train/loss")[-1] < 0.3


def test_a_fast_dev_run_takes_that_many_batches_and_leaves_a_run(run: Start) -> None:
    done = run(WATCHED, "trainer=cpu", "trainer.fast_dev_run=2")
    assert len(Watched.inputs) == 2
    assert len(rows_of(done.folder, "train/loss")) == 2
    assert json.loads((done.folder / "run.json").read_text())["status"] == "finished"


def test_a_plateau_lowers_the_rate_by_what_the_validation_logs(run: Start) -> None:
    words = (*SHORT, "trainer.limit_train_batches=2", "trainer.max_epochs=4", "optimizer.lr=0.1")
    words = (*words, "scheduler=plateau", "scheduler.patience=0", "scheduler.threshold=10", "scheduler.factor=0.5")
    folder = run(*words).folder  # nothing improves by a factor of 11, so every validation but the first lowers it
    assert rows_of(folder, "train/lr") == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_a_schedule_of_epochs_steps_after_each(run: Start) -> None:
    words = (*SHORT, "scheduler=per_epoch", "trainer.limit_train_batches=2", "trainer.max_epochs=3")
    assert rows_of(run(*words, "optimizer.lr=1").folder, "train/lr") == pytest.approx([1, 1, 0.9, 0.9, 0.81, 0.81])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("scheduler=plateau", "scheduler.patience=0", "scheduler.threshold=10"),
        ("scheduler=per_epoch", "trainer.accumulate_grad_batches=2"),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(run: Start, stop: Stop, words: tuple[str, ...]) -> None:
    words = (*SHORT, *words, "trainer.limit_train_batches=4", "trainer.max_epochs=2", "data.batch_size=16")
    expected = result(run(*words).folder)
    for step, k in (("training_step", 2), ("training_step", 3), ("validation_step", 1), ("training_step", 7)):
        folder = stop(step, k, *words)
        assert folder is not None
        run(f"resume={folder}", *words, f"output_dir={folder.parent}")
        assert result(folder) == expected, f"stopped in {step} number {k}"


def test_early_stopping_ends_the_training_and_resumes_to_the_same_bits(run: Start, stop: Stop) -> None:
    words = (*SHORT, "callbacks=early_stopping", "callbacks.early_stopping.patience=2", "optimizer.lr=0")
    words = (*words, "norm=groupnorm", "trainer.limit_train_batches=2", "trainer.max_epochs=9")
    whole = run(*words).folder
    assert len(rows_of(whole, "train/loss")) == 6  # the first epoch, and two without an improvement
    folder = stop("training_step", 4, *words)
    assert folder is not None
    run(f"resume={folder}", *words, f"output_dir={folder.parent}")
    assert result(folder) == result(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trainer.accumulate_grad_batches=0",), r"trainer.accumulate_grad_batches=0: use 1 or more batches"),
        (
            ("trainer.accumulate_grad_batches=2", "data.micro_batch_size=16"),
            r"trainer.accumulate_grad_batches=2, data.micro_batch_size=16: both split a step .*; set one of them",
        ),
        (("trainer.overfit_batches=1.5",), r"trainer.overfit_batches=1.5: use a number of batches, or 0 to turn it"),
        (("trainer.fast_dev_run=-1",), r"trainer.fast_dev_run=-1: use a number of batches, or 0 to turn it off"),
        (("scheduler=plateau", "scheduler.factor=1.5"), r"factor=1.5: use a factor between 0 and 1, for example 0.1"),
    ],
)
def test_options_that_make_no_sense_are_refused(run: Start, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("trainer=cpu", *words)
