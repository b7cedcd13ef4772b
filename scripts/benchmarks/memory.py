"""Peak memory of a training run, against the hand-written loop of `step`, each in a new process.

On the CPU this is the peak resident set size of the process (`ru_maxrss`): in total, and above the size after loading
the libraries. On a GPU it is torch's peak allocation.

"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from omegaconf import DictConfig

from ablab.lab.train import train
from benchmarks.measuring import Ratio, compare_times
from benchmarks.step import SKIPPED, compose_config, time_hand_written

SCRIPTS = Path(__file__).parents[1]
MIB = 2**20
# overrides, and the number of steps on the CPU and on a GPU
PLACES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "resnet-8, 64 digits": (("data.batch_size=64",), 50, 50),
    "resnet18, 128 of 32x32": (
        ("model=resnet18", "data=synthetic_images", "data.num_samples=512", "data.batch_size=128"),
        4,
        50,
    ),
    "transformer, 32 of 128 tokens": (("model=transformer", "data=synthetic_text", "data.num_tokens=100000"), 20, 50),
}


def memory(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure the peak memory of a run against that of a hand-written loop."""
    cuda = device.type == "cuda"
    trainer = f"trainer={'gpu' if cuda else 'cpu'}"
    for place, (words, on_cpu, on_gpu) in PLACES.items():
        found: dict[str, list[dict[str, float]]] = {loop: [] for loop in LOOPS}
        for _ in range(rounds):
            for loop in LOOPS:
                found[loop].append(peak_memory(loop, on_gpu if cuda else on_cpu, trainer, *words))
        for what in found["a run"][0]:
            ours, theirs = ([taken[what] for taken in found[loop]] for loop in LOOPS)
            yield compare_times(place, f"a run: {what}", ours, "by hand", theirs, unit="MiB")


def run_training(cfg: DictConfig, steps: int) -> None:
    """Execute a full run: training, validation, checkpoints and the test of the best weights."""
    with tempfile.TemporaryDirectory() as cfg.output_dir, redirect_stdout(io.StringIO()):
        train(cfg)


LOOPS: dict[str, Callable[[DictConfig, int], object]] = {"a run": run_training, "by hand": time_hand_written}


def peak_memory(loop: str, steps: int, *words: str) -> dict[str, float]:
    """Return the peak memory of a training run in MiB, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", loop, str(steps), *words]
    path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, encoding="utf-8"
    ).stdout
    found: dict[str, float] = json.loads(printed.splitlines()[-1])
    return found


def main(loop: str, steps: str, *words: str) -> None:
    """Run the measurement in its own process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    length = (f"trainer.max_steps={SKIPPED + int(steps)}", "trainer.val_check_interval=3")
    limits = ("trainer.check_val_every_n_epoch=1", "trainer.limit_test_batches=2", "trainer.deterministic=false")
    cfg = compose_config("logger=csv", *words, *length, *limits)
    LOOPS[loop](cfg, int(steps))
    if torch.cuda.is_available() and cfg.trainer.accelerator == "gpu":
        print(json.dumps({"on the GPU": torch.cuda.max_memory_allocated() / MIB}))
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"above its libraries": (peak - before) / 1024, "the whole process": peak / 1024}))


if __name__ == "__main__":
    main(*sys.argv[1:])
