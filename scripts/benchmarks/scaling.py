"""The speedup and overhead of several processes: full training runs, timed from their first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.measuring import Ratio, measure

ROOT = Path(__file__).parents[2]
WORDS = (
    *("logger=csv", "data=synthetic_images", "data.num_samples=8192", "data.batch_size=64", "norm=groupnorm"),
    *("trainer.deterministic=true", "trainer.max_epochs=-1", "trainer.max_steps=100", "callbacks.checkpoints=null"),
    *("trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
)
ALONE, TOGETHER = ("trainer.devices=1",), ("trainer.devices=2",)
DDP, FSDP = ("trainer=ddp",), ("trainer=fsdp",)
# name, overrides, peer: the same steps with the same global batch
SINGLE: list[tuple[str, tuple[str, ...], str]] = [("ddp, 1 process", DDP + ALONE, "no ddp")]
SEVERAL = [
    ("ddp, 2 processes", DDP + TOGETHER, "no ddp"),
    ("fsdp, 2 processes", FSDP + TOGETHER, "ddp, 2 processes"),
    ("static_graph", (*DDP, *TOGETHER, "trainer.strategy.static_graph=true"), "ddp, 2 processes"),
    ("bucket_cap_mb=1", (*DDP, *TOGETHER, "trainer.strategy.bucket_cap_mb=1"), "ddp, 2 processes"),
    ("fixed_buckets", (*DDP, *TOGETHER, "trainer.strategy.find_unused_parameters=true"), "ddp, 2 processes"),
]
ON_GPUS = [("compression=bf16", (*DDP, *TOGETHER, "trainer.strategy.compression=bf16"), "ddp, 2 processes")]


def scaling(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure 100 steps of the default network on 64 images of 32x32, in one process or two, with one thread each.

    On a machine with a single GPU, the measurement of two is skipped.
    """
    cuda = device.type == "cuda"
    several = SEVERAL if not cuda else [*SEVERAL, *ON_GPUS] if torch.cuda.device_count() > 1 else []
    accelerator = "trainer.accelerator=gpu" if cuda else "trainer.accelerator=cpu"
    known = {"no ddp": ("trainer=gpu" if cuda else "trainer=cpu",), "ddp, 2 processes": DDP + TOGETHER}
    for name, words, peer in (*SINGLE, *several):
        ours, theirs = partial(seconds, accelerator, *words), partial(seconds, accelerator, *known[peer])
        yield measure("resnet", name, ours, peer, theirs, rounds, warmup=1)


def seconds(*words: str) -> float:
    """Return the seconds of a training run from its first step on, in a new process."""
    ordered = sorted(words, key=lambda word: not word.startswith("trainer="))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *ordered, *WORDS, f"folder={run}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return float(json.loads((run / "run.json").read_text(encoding="utf-8"))["seconds"])
