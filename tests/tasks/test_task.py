"""A subclass of a task overrides what it likes, as every LightningModule may; nothing is silently wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from tests.exact.resuming import quiet_trainer
from torch import Tensor

from ablab.data.batch import Batch
from ablab.errors import ConfigError, RunError
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.train import assemble
from ablab.tasks.classification import Classification

Start = Callable[..., SimpleNamespace]
Weights = Callable[[Path], dict[str, Tensor]]
WORDS = ("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    Own.seen = []
    return


class Own(Classification):
    """Notes what its steps return."""

    seen: ClassVar[list[float]] = []


class ReturnsLoss(Own):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = self.loss(self.model(batch.inputs), batch)
        self.seen.append(float(loss.detach()))
        return loss


class ReturnsDict(ReturnsLoss):
    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


class ClearsItself(Own):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


class StepsItself(ReturnsLoss):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)


class GoesBackward(ReturnsLoss):
    def backward(self, loss: Tensor, *arguments: Any, **settings: Any) -> None:
        loss.backward()


class ForgetsSuper(Own):
    """Every hook that Lightning has, without a word to the task's own."""


for name in (
    *("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"),
    *("on_train_epoch_end", "on_train_end", "on_fit_end", "on_validation_start", "on_validation_epoch_start"),
    *("on_validation_epoch_end", "on_validation_end", "on_test_epoch_start", "on_test_epoch_end"),
    *("on_save_checkpoint", "on_load_checkpoint", "configure_callbacks"),
):
    setattr(ForgetsSuper, name, lambda self, *arguments: None)


def in_tests(kind: type) -> str:
    return f"task._target_=tests.tasks.test_task.{kind.__name__}"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Plain(L.LightningModule):
    """What a task does, written for Lightning alone."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.model, self.parts = parts.task.model, [parts]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch.inputs), batch.targets)

    def configure_optimizers(self) -> Any:
        return self.parts[0].task.configure_optimizers()


@pytest.fixture
def reference(config: Callable[..., DictConfig]) -> dict[str, Tensor]:
    """The weights that Lightning's own trainer and loop end with."""
    parts = assemble(config(*WORDS, "logger=csv"))
    trainer = quiet_trainer(
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=0,
        use_distributed_sampler=False,
        deterministic=True,
    )
    parts.task.trainer = trainer
    trainer.fit(Plain(parts), datamodule=parts.data)
    return {f"model.{name}": value for name, value in parts.task.model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize(
    "kind", [Classification, ReturnsLoss, ReturnsDict, ClearsItself, StepsItself, GoesBackward, ForgetsSuper]
)
def test_whatever_a_task_overrides_it_learns_what_plain_lightning_does(
    run: Start, last_weights: Weights, reference: dict[str, Tensor], kind: type
) -> None:
    done = run(*WORDS, in_tests(kind))
    weights = last_weights(done.folder)
    assert same(weights, {name.removeprefix("model."): value for name, value in reference.items()})
    rows = read_rows(done.folder)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 8
    assert all(row["train/gradient_norm"] > 0 for row in rows if "train/loss" in row)
    if Own.seen:
        assert losses == Own.seen
    assert "test/accuracy" in done.metrics


def test_a_loss_with_a_penalty_is_the_loss_that_is_logged(run: Start) -> None:
    folder = run(*WORDS, in_tests(Penalized)).folder
    rows = [row for row in read_rows(folder) if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == Penalized.seen
    parts = run(*WORDS, in_tests(Penalized), "data.micro_batch_size=16").folder
    assert next(row["train/loss"] for row in read_rows(parts) if "train/loss" in row) > 100


class Penalized(Own):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) + 100
        self.seen.append(float(loss.detach()))
        return loss


class SkipsOdd(Own):
    """Leaves each second step out."""

    after: ClassVar[list[Tensor]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.after.append(next(self.model.parameters()).detach().clone())
        return None if batch_idx % 2 else self.loss(self(batch), batch)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_that_returns_none_changes_no_weight_and_logs_no_loss(run: Start) -> None:
    SkipsOdd.after = []
    folder = run(*WORDS, in_tests(SkipsOdd)).folder
    weights = SkipsOdd.after
    assert [torch.equal(weights[i], weights[i + 1]) for i in range(7)] == [False, True] * 3 + [False]
    rows = [row for row in read_rows(folder) if "train/lr" in row]
    assert ["train/loss" in row for row in rows] == [True, False] * 4
    assert ["train/gradient_norm" in row for row in rows] == [True, False] * 4


class LogsItself(Own):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log(
            "val/accuracy", (self(batch).argmax(-1) == batch.targets).float().mean(), batch_size=len(batch.targets)
        )


class LogsNothing(Own):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch)


def test_a_validation_step_that_logs_by_itself_chooses_the_weights(run: Start) -> None:
    expected, done = run(*WORDS), run(*WORDS, in_tests(LogsItself))
    assert done.metrics["val/accuracy"] == pytest.approx(expected.metrics["val/accuracy"], abs=1e-6)
    assert not any("val/loss" in row for row in read_rows(done.folder)), "nothing measured it"


def test_a_validation_step_that_does_not_log_the_monitored_metric_is_one_message(run: Start) -> None:
    with pytest.raises(
        RunError, match=r"monitor.metric=val/accuracy: the validation did not log it, but .*validation_step"
    ):
        run(*WORDS, in_tests(LogsNothing))


class Manual(Own):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.automatic_optimization = False


class ManualSteps(Manual):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        loss = self.loss(self(batch), batch)
        self.seen.append(float(loss.detach()))
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr, call-arg]


def test_manual_optimization_trains_as_automatic_one_does(run: Start, last_weights: Weights) -> None:
    expected, done = run(*WORDS), run(*WORDS, in_tests(ManualSteps))
    assert same(last_weights(expected.folder), last_weights(done.folder))
    assert [row["train/loss"] for row in read_rows(done.folder) if "train/loss" in row] == Own.seen


class ManualAccumulation(Manual):
    """Steps after every second batch, with the gradients of both."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(self(batch), batch)
        before = sum(float(p.grad.abs().sum()) for p in self.parameters() if p.grad is not None)
        self.seen.append(before)
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()  # type: ignore[union-attr]
            self.optimizers().zero_grad()  # type: ignore[union-attr]


def test_gradients_that_a_task_accumulates_by_hand_are_left_alone(run: Start) -> None:
    run(*WORDS, in_tests(ManualAccumulation))
    assert all((gradients > 0) == bool(number % 2) for number, gradients in enumerate(Own.seen))


def test_manual_optimization_resumes_to_the_same_bits(
    run: Start, stop: Callable[..., Path | None], last_weights: Weights
) -> None:
    whole = run(*WORDS, in_tests(ManualSteps)).folder
    folder = stop("seed_current_step", 6, *WORDS, in_tests(ManualSteps))
    assert folder is not None
    run(f"resume={folder}", in_tests(ManualSteps), *WORDS, f"output_dir={folder.parent}")
    assert same(last_weights(whole), last_weights(folder))


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        (Manual, (), r"training_step: with automatic_optimization=False .* Manual does not override it"),
        (
            ReturnsLoss,
            ("data.micro_batch_size=16",),
            r"training_step: ReturnsLoss overrides it.*=16; override loss\(\)",
        ),
        (ClearsItself, ("data.micro_batch_size=16",), r"optimizer_zero_grad: ClearsItself overrides it.*=16\); leave"),
    ],
)
def test_overrides_that_do_not_go_together_are_refused_before_anything_is_written(
    run: Start, tmp_path: Path, kind: type, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*WORDS, *words, in_tests(kind))
    assert not list(tmp_path.glob("runs/*"))


def test_a_task_with_hooks_of_its_own_resumes_to_the_same_bits(
    run: Start, stop: Callable[..., Path | None], last_weights: Weights
) -> None:
    whole = run(*WORDS, in_tests(ForgetsSuper)).folder
    folder = stop("training_step", 6, *WORDS, in_tests(ForgetsSuper))
    assert folder is not None
    run(f"resume={folder}", in_tests(ForgetsSuper), *WORDS, f"output_dir={folder.parent}")
    assert same(last_weights(whole), last_weights(folder))
    assert (whole / "metrics.csv").read_text() == (folder / "metrics.csv").read_text()
