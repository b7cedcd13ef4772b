"""The benchmarks measure what they say that they measure; how fast it is, no test asks."""

from __future__ import annotations

import csv
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from ablab.lab.train import assemble
from ablab.optim.optimizer import make_optimizer

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("norm", ["groupnorm", "batchnorm"])
def test_stacked_networks_learn_what_each_learns_alone(
    norm: str, config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    seeds: Any = importlib.import_module("benchmarks.seeds")
    words = ("logger=csv", "trainer.precision=64-true", f"norm={norm}", "optimizer.lr=0.01")
    several = [[assemble(config(*words, f"seed={seed}")) for seed in (0, 1)] for _ in range(2)]
    stack = seeds.Stack(several[0], torch.device("cpu"))
    optimizers = [make_optimizer(parts.task.optimizer_factory, parts.task.model) for parts in several[1]]
    inputs, targets = torch.rand(2, 8, 1, 8, 8, dtype=torch.float64), torch.randint(10, (2, 8))
    for _ in range(3):
        losses, norms, _ = stack.step(inputs, targets)
        for number, (parts, optimizer) in enumerate(zip(several[1], optimizers, strict=True)):
            optimizer.zero_grad()
            loss = F.cross_entropy(parts.task.model(inputs[number]), targets[number])
            loss.backward()
            gradients = torch.cat([p.grad.flatten() for p in parts.task.model.parameters() if p.grad is not None])
            optimizer.step()
            assert float(losses[number]) == pytest.approx(float(loss.detach()), rel=1e-9)
            assert float(norms[number]) == pytest.approx(float(gradients.norm()), rel=1e-9)
    for number, parts in enumerate(several[1]):
        for name, alone in parts.task.model.named_parameters():
            torch.testing.assert_close(stack.parameters[name][number].detach(), alone.detach(), rtol=1e-8, atol=1e-10)
        for name, buffer in parts.task.model.named_buffers():
            torch.testing.assert_close(stack.buffers[name][number], buffer, rtol=1e-6, atol=1e-8)


def test_a_step_of_several_runs_is_taken_over_the_time_in_which_all_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    seeds: Any = importlib.import_module("benchmarks.seeds")
    first = [float(number) for number in range(92)]  # a step a second
    late = [20 + 2.0 * number for number in range(42)]  # half as fast, and begins later
    assert seeds.step_of([first]) == pytest.approx(1, rel=0.1)
    assert seeds.step_of([first, late]) == pytest.approx(2 / 1.5, rel=0.2)


@pytest.mark.slow
def test_a_run_and_the_script_by_hand_tell_the_time_after_their_first_step(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    began = time.monotonic()
    by_hand = command("--epochs", "0", script="scripts/benchmarks/by_hand.py")
    words = ["logger=csv", "+callbacks.first_step._target_=benchmarks.first_step.FirstStep"]
    run = command(*words, PYTHONPATH=f"{ROOT / 'scripts'}:{ROOT / 'src'}")
    for done in (by_hand, run):
        assert began < float(done.stdout.splitlines()[-1]) < time.monotonic(), done.stderr
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0"]
    [folder] = (tmp_path / "runs").iterdir()
    assert not (folder / "checkpoints").exists()  # it has left behind the first step


@pytest.mark.slow
def test_the_benchmark_of_a_sweep_times_cells_with_both_loggers(command: Callable[..., Any]) -> None:
    done = command("sweep", "--rounds", "1", script="scripts/benchmark.py")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("a cell")]
    assert [" ".join(row[4:-2]) for row in rows] == ["steps, logger=csv", "steps, W&B offline"]
    assert all(float(row[-2]) > 0 for row in rows)
