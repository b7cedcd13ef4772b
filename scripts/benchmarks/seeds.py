"""The cost of five seeds in parallel on one device, against one: in separate processes, and as one stacked network.

Separate processes are `hydra.launcher.num_processes=5`; each run is then equal to the bit to the run alone. The stacked
network with an additional dimension (`torch.func`) is written by hand here: it is no run, and rounds differently.

"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from ablab.lab.train import Parts, assemble
from ablab.optim.optimizer import make_optimizer
from benchmarks.measuring import Ratio, compare_times, measure
from benchmarks.step import SKIPPED, STEPS, compose_config, now, time_hand_written

SCRIPTS = Path(__file__).parents[1]
SEEDS = 5
PLACE = "resnet-8, 32 digits"
LENGTH = {"cpu": 300, "cuda": 1000}  # steps per run: a few seconds, so that a late start matters little


def seeds(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure five seeds in parallel against one, by processes and by stacking."""
    several: dict[str, list[float]] = {name: [] for name in Times._fields}
    one: dict[str, list[float]] = {name: [] for name in Times._fields}
    for number in range(rounds):
        for found, num_seeds in ((one, 1), (several, SEEDS))[:: -1 if number % 2 else 1]:
            for name, seconds in launch_seeds(num_seeds, device)._asdict().items():
                found[name].append(seconds)
    for name, what in (("step", "a step"), ("training", "training"), ("whole", "the whole command")):
        yield compare_times(PLACE, f"{SEEDS} processes: {what}", several[name], "one run", one[name])
    trainer = f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}"
    steps = f"trainer.max_steps={SKIPPED + STEPS}"
    for norm in ("groupnorm", "batchnorm"):
        cfg = compose_config(trainer, steps, "logger=csv", "trainer.deterministic=false", f"norm={norm}")

        def stacked(norm: str = norm) -> float:
            return stacked_steps(trainer, steps, norm)

        def alone(cfg: Any = cfg) -> float:
            return time_hand_written(cfg, STEPS)

        yield measure(PLACE, f"{SEEDS} stacked, {norm}: a step", stacked, "one by hand", alone, rounds, warmup=1)


# A process each ---------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Seconds per step from the first step of the first run to the end of the last run, and seconds in total."""

    step: float
    training: float
    whole: float


class Clock(L.Callback):
    """Writes when the steps of a run end, by a clock that all processes of a machine share."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times.append(time.monotonic())

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.times.append(time.monotonic())  # the check of the loss has synchronized with the device in each step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times.append(time.monotonic())
        (Path(trainer.loggers[0].save_dir or ".") / "clock.json").write_text(json.dumps(self.times), encoding="utf-8")


def launch_seeds(num_seeds: int, device: torch.device) -> Times:
    """Launch a number of seeds of the default network in parallel, as from the command line."""
    words = (
        *("-m", f"seed={','.join(map(str, range(num_seeds)))}", f"hydra.launcher.num_processes={num_seeds}"),
        *("logger=csv", f"trainer={'gpu' if device.type == 'cuda' else 'cpu'}", "trainer.max_epochs=-1"),
        *(f"trainer.max_steps={LENGTH[device.type]}", "+callbacks.clock._target_=benchmarks.seeds.Clock"),
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPTS.parent / "train.py"), *words, f"output_dir={folder}"]
        path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        whole = time.monotonic() - began
        clocks = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*/*/clock.json")]
    assert len(clocks) == num_seeds
    return Times(step_of(clocks), max(map(max, clocks)) - min(map(min, clocks)), whole)


def step_of(clocks: Sequence[Sequence[float]]) -> float:
    """Return the seconds per step while all runs train."""
    first, last = max(clock[SKIPPED] for clock in clocks), min(clock[-2] for clock in clocks)
    if last <= first:
        raise RuntimeError("the runs did not train at the same time: give them more steps")
    done = [sum(first <= moment <= last for moment in clock[1:-1]) for clock in clocks]
    return (last - first) * len(clocks) / sum(done)


# One stacked network ----------------------------------------------------------------------------------------------


class Stack:
    """Several models of one kind stacked into one, whose parameters have an additional dimension, and their optimizer.

    Args:
        parts: of the runs, one for each seed.
        device: of the stack.
    """

    def __init__(self, parts: Sequence[Parts], device: torch.device) -> None:
        self.model = parts[0].task.model.to(device)
        self.parameters, self.buffers = stack_module_state([part.task.model.to(device) for part in parts])
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups: list[dict[str, Any]] = [
            {"params": [self.parameters[names[id(p)]] for p in group["params"]], "weight_decay": group["weight_decay"]}
            for group in make_optimizer(parts[0].task.optimizer_factory, self.model).param_groups
        ]
        self.optimizer = parts[0].task.optimizer_factory(groups)

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step of each model on its own batch.

        Shape:
            inputs `(S, N, …)`, targets `(S, N)` -> losses `(S)`, norms of the gradients `(S)`, logits `(S, N, classes)`
        """
        with torch.no_grad():  # torch.func computes its gradients even under no_grad
            gradients, (losses, logits) = vmap(grad_and_value(self.loss, has_aux=True))(
                self.parameters, self.buffers, inputs, targets
            )
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients.values()])
        norms = squares.sum(0).sqrt()
        if not bool((losses.isfinite() & norms.isfinite()).all()):
            raise RuntimeError("a loss or its gradient is not finite")
        self.optimizer.step()
        return losses, norms, logits

    def loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits: Tensor = functional_call(self.model, (parameters, buffers), (inputs,))
        return F.cross_entropy(logits, targets), logits.detach()


def stacked_steps(trainer: str, length: str, norm: str) -> float:
    """Return the seconds per step of a hand-written loop that trains all seeds, each on its own batches."""
    words = (trainer, length, "logger=csv", "trainer.deterministic=false", f"norm={norm}")
    parts = [assemble(compose_config(*words, f"seed={seed}")) for seed in range(SEEDS)]
    device = torch.device("cuda" if trainer.endswith("gpu") else "cpu")
    data = parts[0].data
    assert data.splits is not None
    inputs, targets, *_ = data.on_after_batch_transfer(data.splits.train.as_batch(), 0)
    inputs, targets = inputs.to(device), targets.to(device)
    stack = Stack(parts, device)
    schedule = parts[0].task.scheduler_factory(stack.optimizer, SKIPPED + STEPS)
    right = torch.zeros(SEEDS, device=device)
    size, position, order = data.batch_size, math.inf, torch.empty(0)
    stack.model.train()
    began = 0.0
    for number in range(SKIPPED + STEPS):
        if number == SKIPPED:
            began = now()
        if position + size > len(targets):
            order = torch.stack([torch.randperm(len(targets)) for _ in range(SEEDS)]).to(device)
            position = 0
        chosen = order[:, int(position) : int(position) + size]
        position += size
        _, _, logits = stack.step(inputs[chosen], targets[chosen])
        schedule.step()
        right += (logits.argmax(-1) == targets[chosen]).sum(1)
    return (now() - began) / STEPS
