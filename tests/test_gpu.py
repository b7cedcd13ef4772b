"""What only a GPU can show; the rest of the tests need none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ablab.data.batch import Batch
from ablab.errors import Diverged
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train
from ablab.tasks.task import Task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

Start = Callable[..., SimpleNamespace]
WORDS = ("trainer=gpu", "trainer.max_epochs=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
TEXT = ("model=transformer", "data=synthetic_text", "data.num_tokens=200000")
IMAGES = ("data=synthetic_images", "data.num_samples=2000", "data/augment=crop_flip")


@pytest.mark.parametrize(
    "words", [("optimizer=sgd",), ("optimizer=adamw", *TEXT), IMAGES, ("trainer.precision=bf16-mixed",)]
)
def test_no_step_waits_for_the_gpu(run: Start, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    original = Task.on_train_batch_start
    watched = []

    def start(self: Task, *arguments: Any) -> None:
        watched.append(5 <= self.trainer.global_step < 25)
        torch.cuda.set_sync_debug_mode("error" if watched[-1] else "default")
        original(self, *arguments)

    monkeypatch.setattr(Task, "on_train_batch_start", start)
    try:
        run(*WORDS, "trainer.limit_train_batches=30", "trainer.log_every_n_steps=1000", *words)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(watched) == 20


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_a_step_that_diverges_changes_no_weight_and_is_named(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, optimizer: str
) -> None:
    original = Task.training_step
    before: dict[str, Tensor] = {}
    tasks = []

    def training_step(self: Task, batch: Batch, batch_idx: int) -> Tensor:
        if self.global_step == 7:
            before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
            batch.inputs[0, 0, 0, 0] = math.nan
            tasks.append(self)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Task, "training_step", training_step)
    with pytest.raises(Diverged, match=r"^step 7 \(epoch 0\): the loss is nan; its inputs are not finite"):
        run(*WORDS, f"optimizer={optimizer}", "callbacks.checkpoints.every_n_steps=1", "callbacks.checkpoints.keep=20")
    assert all(torch.equal(p.cpu(), before[name].cpu()) for name, p in tasks[0].model.named_parameters())
    [folder] = (tmp_path / "runs").iterdir()
    newest = max((folder / "checkpoints").glob("*.ckpt"))
    saved = torch.load(newest, weights_only=True)
    assert saved["global_step"] == 7
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_the_first_gradient_that_is_not_finite_is_named_a_step_later(
    run: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Task.micro_batch_loss

    class Endless(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Any:
            return gradient * math.inf

    def micro_batch_loss(self: Task, part: Batch, batch: Batch) -> Tensor:
        loss = original(self, part, batch)
        return Endless.apply(loss) if self.global_step >= 3 else loss  # type: ignore[no-any-return]

    monkeypatch.setattr(Task, "micro_batch_loss", micro_batch_loss)
    with pytest.raises(Diverged, match=r"^step 3 \(epoch 0\): the loss is [\d.]+, its gradient (nan|inf); all outputs"):
        run(*WORDS)


def test_a_run_that_is_stopped_on_a_gpu_goes_on_to_the_same_bits(
    run: Start, stop: Callable[..., Path | None], last_weights: Callable[..., dict[str, Tensor]]
) -> None:
    words = (
        "trainer=gpu",
        "trainer.deterministic=true",
        "trainer.max_epochs=2",
        "trainer.log_every_n_steps=1",
        *IMAGES,
    )
    whole = run(*words)
    folder = stop("training_step", 11, *words)
    assert folder is not None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    expected, found = last_weights(whole.folder), last_weights(folder)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert read_rows(folder) == read_rows(whole.folder)


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=bf16-mixed", "trainer.channels_last=true"),
        ("trainer.precision=16-mixed", "trainer.gradient_clip_val=1.0"),
        ("trainer.compile=default",),
        ("trainer.compile=reduce-overhead",),
        ("data.micro_batch_size=8",),
        ("optimizer=muon",),
        ("trainer.profile=true",),
    ],
)
def test_every_way_to_carry_out_a_step_learns(run: Start, words: tuple[str, ...]) -> None:
    done = run("trainer=gpu", "trainer.max_epochs=10", *words)
    assert done.metrics["test/accuracy"] > 0.9
