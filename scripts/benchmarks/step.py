"""The overhead of a training step beside its mathematics: a run, plain Lightning, and a hand-written loop.

All three train the same network on the same number of samples with the same optimizer, and compute the accuracy of each
epoch. The run and the hand-written loop check every loss and gradient norm, and log both and the learning rate every
ten steps; plain Lightning, as in tutorials, does not check gradients.

"""

from __future__ import annotations

import csv
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torchmetrics.classification import MulticlassAccuracy

from ablab.lab.run.run import Run
from ablab.lab.train import Parts, assemble, effective_batch_sizes
from ablab.optim.optimizer import make_optimizer
from benchmarks.measuring import Ratio, measure

CONF = Path(__file__).parents[2] / "conf"
SKIPPED, STEPS = 20, 100  # untimed and timed steps of a training run
LAST = 2  # untimed steps at the end: before the last one, a run saves a checkpoint, regardless of its length
EVERY = 10  # steps between two rows of metrics.csv
SMALL = {
    "resnet-8, 8 digits": ("data.batch_size=8",),
    "resnet-8, 64 digits": ("data.batch_size=64",),
}
LARGE = ("model=resnet18", "data=synthetic_images", "data.num_samples=2048", "data.batch_size=128")
FAST = (*LARGE, "trainer.precision=bf16-mixed", "trainer.channels_last=true")


def step(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure a step of a run, and of plain Lightning, against a hand-written loop."""
    places = {**SMALL, "resnet18, 128 of 32x32": LARGE}
    if device.type == "cuda":
        places["resnet18, 128 of 32x32, bf16, channels last"] = FAST
    for place, words in places.items():
        few = 4 if words[0] == LARGE[0] and device.type == "cpu" else STEPS
        turns = max(2, rounds // 4) if few < STEPS else rounds
        cfg = training_config(device, few, *words)

        def timed(
            train: Callable[[DictConfig, int], float], cfg: DictConfig = cfg, few: int = few
        ) -> Callable[[], float]:
            return lambda: train(cfg, few)

        yield measure(place, "a run's step", timed(time_run), "by hand", timed(time_hand_written), turns, warmup=1)
        yield measure(
            place, "bare Lightning", timed(time_bare_lightning), "by hand", timed(time_hand_written), turns, warmup=1
        )


def training_config(device: torch.device, steps: int, *words: str) -> DictConfig:
    """Return the config of a training run with a number of steps, and of warmup steps that are not timed."""
    trainer = f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}"
    length = f"trainer.max_steps={SKIPPED + steps + LAST}"
    return compose_config(trainer, length, "logger=csv", "trainer.deterministic=false", *words)


def compose_config(*words: str) -> DictConfig:
    limits = ("trainer.max_epochs=-1", "trainer.limit_val_batches=1", "trainer.check_val_every_n_epoch=1000000")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*limits, "callbacks.samples=null", *words])


class Clock(L.Callback):
    """Measures the time from one step to another."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.seconds = math.nan

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == SKIPPED:
            self.began = now()

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.last:
            self.seconds = now() - self.began


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_run(cfg: DictConfig, steps: int) -> float:
    """Return the seconds per step of a run with all its defaults, including checkpoints and gradient checks."""
    cfg = cfg.copy()
    clock = Clock(SKIPPED + steps)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        cfg.output_dir = folder
        parts = assemble(cfg)
        parts.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        batch_sizes = effective_batch_sizes(parts.data, parts.norm, parts.trainer)
        with Run.open(cfg, data=parts.data.record(), batch_sizes=batch_sizes) as run:
            parts.trainer.loggers = run.start([])
            parts.trainer.fit(parts.task, datamodule=parts.data)
    return clock.seconds / steps


class BareModule(L.LightningModule):
    """A module as in tutorials, with the same model, optimizer, data and schedule."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = [parts]
        self.model = parts.task.model
        self.accuracy = MulticlassAccuracy(parts.data.model_sizes["num_classes"], average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch.inputs)
        loss = F.cross_entropy(logits, batch.targets)
        self.accuracy(logits, batch.targets)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.parts[0].task.configure_optimizers()


def time_bare_lightning(cfg: DictConfig, steps: int) -> float:
    """Return the seconds per step of Lightning with one metric and its CSV logger."""
    clock = Clock(SKIPPED + steps)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        parts = assemble(cfg)
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator=cfg.trainer.accelerator,
            devices=1,
            max_steps=SKIPPED + steps + LAST,
            log_every_n_steps=EVERY,
            logger=L.pytorch.loggers.CSVLogger(folder),
            callbacks=[clock],
            limit_val_batches=0,
            enable_model_summary=False,
            enable_progress_bar=False,
            precision=cfg.trainer.precision,
        )
        module = BareModule(parts)
        parts.task.trainer = trainer
        trainer.fit(module, datamodule=parts.data)
    return clock.seconds / steps


def time_hand_written(cfg: DictConfig, steps: int, model: nn.Module | None = None) -> float:
    """Return the seconds per step of a loop without a framework.

    Args:
        cfg: the training run, its device and precision.
        steps: the number of timed steps.
        model: replaces the model of the config, with the same inputs and outputs.
    """
    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        parts = assemble(cfg)
        device = torch.device("cuda" if cfg.trainer.accelerator == "gpu" else "cpu")
        data, factory = parts.data, parts.task.optimizer_factory
        if model is None:
            model = parts.task.model.to(device)
            optimizer = make_optimizer(factory, model)
        else:
            optimizer = factory(model.to(device).parameters(), fused=device.type == "cuda")
        schedule = parts.task.scheduler_factory(optimizer, SKIPPED + steps)
        half = torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed")
        assert data.splits is not None
        inputs, targets, *_ = data.on_after_batch_transfer(data.splits.train[range(len(data.splits.train))], 0)
        inputs, targets = inputs.to(device), targets.to(device)
        size, position, right, seen = data.batch_size, len(targets), torch.zeros((), device=device), 0
        order = torch.empty(0)
        good = torch.ones((), device=device, dtype=torch.bool)
        model.train()
        file = (Path(folder) / "metrics.csv").open("w", newline="", encoding="utf-8")
        rows = csv.writer(file)
        began = 0.0
        for number in range(SKIPPED + steps):
            if number == SKIPPED:
                began = now()
            if position + size > len(targets):
                order, position = torch.randperm(len(targets)).to(device), 0
            chosen = order[position : position + size]
            position += size
            with half:
                logits = model(inputs[chosen])
                loss = F.cross_entropy(logits.flatten(0, -2), targets[chosen].flatten())
            optimizer.zero_grad()
            loss.backward()
            norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if device.type == "cuda":  # reading it in each step would synchronize with the device
                good &= loss.isfinite() & norm.isfinite()
            elif not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise RuntimeError(f"step {number}: the loss or its gradient is not finite")
            optimizer.step()
            schedule.step()
            if targets.dim() == 1:
                right += (logits.detach().argmax(-1) == targets[chosen]).sum()
                seen += size
            if number % EVERY == 0:
                if not good:
                    raise RuntimeError(f"step {number} or one before: the loss or its gradient is not finite")
                rows.writerow([number, loss.item(), norm.item(), schedule.get_last_lr()[0]])
        seconds = now() - began
        file.close()
    return seconds / steps
