"""The cost of a diagnostic: full runs with it, at the steps that its YAML sets, against runs without."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from ablab.lab.train import train
from benchmarks.measuring import Ratio, measure

CONF = Path(__file__).parents[2] / "conf"
STEPS = ("trainer.max_epochs=-1", "trainer.max_steps=200", "callbacks.checkpoints=null")


def measures(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure each diagnostic on 200 steps of the default network, a ResNet-8 of width 16 on digits, batch size 32."""
    trainer = "gpu" if device.type == "cuda" else "cpu"

    def run(*words: str) -> None:
        with initialize_config_dir(str(CONF), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
            fixed = ("logger=csv", f"trainer={trainer}", *STEPS, f"output_dir={folder}")
            with redirect_stdout(io.StringIO()):
                train(compose("train", [*fixed, *words]))

    for name in sorted(file.stem for file in (CONF / "callbacks" / "measure").glob("*.yaml")):
        yield measure("resnet", name, lambda name=name: run(f"+callbacks/measure={name}"), "no measure", run, rounds)
