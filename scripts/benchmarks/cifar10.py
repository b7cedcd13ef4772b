"""Time to 94 % on CIFAR-10: full training runs of the speed run, against a hand-written loop of the same mathematics.

Both use the same network, learning rates and number of steps, alternating in one process after one warmup run each. The
loop checks no gradients, counts nothing, logs nothing and saves nothing.

"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from ablab.lab.train import assemble, train
from ablab.optim.optimizer import make_optimizer
from benchmarks.measuring import Ratio, measure
from benchmarks.step import CONF, now

EXPERIMENTS = ("cifar10_speedrun", "cifar10_speedrun_muon")
GOAL = 0.94
# enough to check on a CPU that everything runs; the numbers are meaningless
ON_A_CPU = (
    *("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=4", "data.batch_size=32"),
    "trainer.limit_test_batches=2",
)


def cifar10(rounds: int, device: torch.device, root: Path | None) -> Iterator[Ratio]:
    """Measure full training runs with and without checkpoints, in seconds; `rounds` of each, with different seeds.

    The accuracy of each training run is part of its label.
    """
    words = (*(() if root is None else (f"data.root={root}",)), *(() if device.type == "cuda" else ON_A_CPU))
    for experiment in EXPERIMENTS:
        cfg = compose_config(f"experiment={experiment}", "logger=csv", *words)
        unsaved = compose_config(f"experiment={experiment}", "logger=csv", "callbacks.checkpoints=null", *words)
        without = [("a run without checkpoints", unsaved)] if experiment == EXPERIMENTS[0] else []
        for what, ours in (("a run", cfg), *without):
            reached: dict[str, list[float]] = {what: [], "by hand": []}

            def a_run(cfg: DictConfig = ours, found: list[float] = reached[what]) -> float:
                seconds, accuracy = time_run(cfg, seed=len(found))
                found.append(accuracy)
                return seconds

            def a_loop(cfg: DictConfig = ours, found: list[float] = reached["by hand"]) -> float:
                seconds, accuracy = time_hand_written(cfg, seed=len(found))
                found.append(accuracy)
                return seconds

            ratio = measure(experiment, what, a_run, "by hand", a_loop, rounds, warmup=1)
            ours_at, theirs_at = (describe_accuracy(values[1:] or values) for values in reached.values())
            yield replace(ratio, what=f"{what}: {ours_at}", peer=f"by hand: {theirs_at}")


def describe_accuracy(accuracies: list[float]) -> str:
    """Return mean ± standard deviation in %, n, and the number of runs that reached the goal."""
    mean = 100 * statistics.mean(accuracies)
    spread = 100 * statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    share = sum(accuracy >= GOAL for accuracy in accuracies)
    return f"{mean:.2f} ± {spread:.2f} %, {share} of {len(accuracies)} at {100 * GOAL:.0f} %"


def compose_config(*words: str) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(words))


def time_run(cfg: DictConfig, seed: int) -> tuple[float, float]:
    """Return the training seconds of a run, from run.json, and the test accuracy."""
    cfg = cfg.copy()
    cfg.seed = seed
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cfg.output_dir = folder
        run = train(cfg)
    assert run.seconds is not None
    return run.seconds, run.metrics["test/accuracy"]


def time_hand_written(cfg: DictConfig, seed: int) -> tuple[float, float]:
    """Return the seconds of the loop, with data on the device and whitening done, and the test accuracy."""
    cfg = cfg.copy()
    cfg.seed = seed
    with redirect_stdout(io.StringIO()):
        parts = assemble(cfg)
    device = torch.device("cuda" if cfg.trainer.accelerator == "gpu" else "cpu")
    data, task, steps, size = parts.data, parts.task, cfg.trainer.max_steps, cfg.data.batch_size
    model: Any = task.model.to(device)
    assert data.splits is not None
    images, targets = (part.to(device) for part in data.on_after_batch_transfer(data.splits.train.as_batch(), 0)[:2])
    half = torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed")
    generator = torch.Generator(device).manual_seed(seed)

    began = now()
    optimizer = make_optimizer(task.optimizer_factory, model)
    schedule = task.scheduler_factory(optimizer, steps)
    lookahead = cfg.callbacks.lookahead
    slow: list[Tensor] = []
    weights = [tensor.data for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    mirror = torch.rand(len(images), device=device, generator=generator) < 0.5
    model.train()
    taken, epoch = 0, 0
    while taken < steps:
        if epoch == cfg.callbacks.freeze.epoch:
            model.whiten.bias.requires_grad_(False)
        flipped = ~mirror if epoch % 2 else mirror
        order = torch.randperm(len(images), device=device, generator=generator)
        for batch in order[: len(order) // size * size].view(-1, size)[: steps - taken]:
            inputs = augment(images[batch], flipped[batch], cfg.data.augment.crop_padding, generator)
            with half:
                loss = F.cross_entropy(model(inputs), targets[batch], label_smoothing=cfg.task.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            taken += 1
            if lookahead is not None and epoch >= lookahead.start_epoch and taken % lookahead.every_n_steps == 0:
                if slow:
                    kept = lookahead.decay**lookahead.every_n_steps * (taken / steps) ** lookahead.power
                    torch._foreach_lerp_(slow, weights, 1 - kept)
                    torch._foreach_copy_(weights, slow)
                else:
                    slow = [tensor.clone() for tensor in weights]
        if slow:
            torch._foreach_copy_(weights, slow)
        epoch += 1
    seconds = now() - began

    test = data.splits.test.as_batch()
    task.to(device).eval()
    num = len(test.targets) if device.type == "cuda" else 64
    right = 0
    with torch.no_grad(), half:
        for some in torch.arange(num).split(2000):
            batch = data.on_after_batch_transfer(test._replace(inputs=test.inputs[some], targets=test.targets[some]), 0)
            logits = task.average_views(batch._replace(inputs=batch.inputs.to(device)))  # type: ignore[operator]
            right += int((logits.argmax(-1).cpu() == batch.targets).sum())
    return seconds, right / num


def augment(images: Tensor, flipped: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Return images flipped where requested, and cropped at random after reflection padding."""
    images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images, (padding,) * 4, "reflect").permute(0, 2, 3, 1)
    shift = torch.randint(2 * padding + 1, (2, len(images), 1), device=images.device, generator=generator)
    cells = torch.arange(images.shape[-1], device=images.device)
    rows, columns = shift + cells
    number = torch.arange(len(images), device=images.device)
    return padded[number[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
