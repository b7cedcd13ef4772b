"""Measure costs that grow with the number of processes.

    python scripts/scaling.py                          2, 4 and 8 processes on this machine
    python scripts/scaling.py --processes 2 16 --trainer fsdp

The first table shows real runs: the collective calls of rank 0 beside gradients and weights, and the bytes that it
receives, by purpose. The second shows the data: an epoch's batches of one process among 512.

"""

from __future__ import annotations

import argparse
import io
import pickle
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from hydra import compose, initialize_config_dir
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor

from ablab.data.sampler import BatchSampler
from ablab.lab.exact.checkpoints import Checkpoints
from ablab.lab.launch import processes
from ablab.lab.train import train

CONF = Path(__file__).parents[1] / "conf"
STEPS = 16
WORDS = (
    *("logger=csv", "norm=groupnorm", "data.batch_size=64", "trainer.accelerator=cpu", "trainer.deterministic=true"),
    *("trainer.max_epochs=1", f"trainer.limit_train_batches={STEPS}", "callbacks.progress=null"),
    *("trainer.limit_val_batches=2", "trainer.limit_test_batches=2"),
)
EXCHANGES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object")
EXCHANGES += ("broadcast_object_list", "barrier")
SAMPLES, PROCESSES = 1_281_167, 512  # the size of ImageNet


class ExchangeCounter:
    """Calls and bytes of the collectives of this process, by purpose."""

    def __init__(self) -> None:
        self.purpose = "the rest"
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.inside = False

    def exchange(self, name: str) -> Any:
        """Count the calls of one of torch's collectives; nested calls count as part of it."""
        original = getattr(dist, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            outermost, self.inside = not self.inside, True
            try:
                return original(*arguments, **settings)
            finally:
                self.inside = not outermost
                if outermost:
                    self.calls[self.purpose] += 1
                    self.bytes[self.purpose] += size(arguments[0]) if arguments else 0

        return patch.object(dist, name, call)

    def part(self, owner: Any, name: str, purpose: str) -> Any:
        """Attribute the collectives within a function to a purpose."""
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            before, self.purpose = self.purpose, purpose
            try:
                return original(*arguments, **settings)
            finally:
                self.purpose = before

        return patch.object(owner, name, call)


def size(what: Any) -> int:
    """Return the bytes of a tensor, or of several objects."""
    return what.nbytes if isinstance(what, Tensor) else sum(size_of_part(part) for part in what)


def size_of_part(part: Any) -> int:
    return part.nbytes if isinstance(part, Tensor) else len(pickle.dumps(part))


def count_exchanges(number: int, trainer: str) -> tuple[ExchangeCounter, float]:
    """Return the collectives of one run with a number of processes, and its duration."""
    count, began = ExchangeCounter(), time.perf_counter()
    with ExitStack() as stack:
        for name in EXCHANGES:
            stack.enter_context(count.exchange(name))
        stack.enter_context(count.part(processes, "agree", "config"))
        stack.enter_context(count.part(_TrainingEpochLoop, "advance", "steps"))
        stack.enter_context(count.part(_EvaluationLoop, "run", "evaluation"))
        stack.enter_context(count.part(Checkpoints, "save", "checkpoints"))
        stack.enter_context(initialize_config_dir(str(CONF), version_base="1.3"))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(redirect_stdout(io.StringIO()))
        train(compose("train", [f"trainer={trainer}", f"trainer.devices={number}", *WORDS, f"output_dir={folder}"]))
    return count, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--trainer", choices=("ddp_cpu", "fsdp"), default="ddp_cpu")
    options = parser.parse_args()
    purposes = ("config", "steps", "evaluation", "checkpoints", "the rest")
    print(f"A run of {STEPS} steps, two evaluations and two checkpoints: exchanges of process 0, and their bytes")
    print("| processes | " + " | ".join(purposes) + " | whole run |")
    print("|---" * (len(purposes) + 2) + "|")
    for number in options.processes:
        count, seconds = count_exchanges(number, options.trainer)
        cells = [f"{count.calls[purpose]} ({count.bytes[purpose]:,} B)" for purpose in purposes]
        print(f"| {number} | " + " | ".join(cells) + f" | {seconds:.0f} s |", flush=True)

    print(f"\nAn epoch of {SAMPLES:,} samples, {PROCESSES} processes, 16 samples of each in a batch")
    orders = [
        BatchSampler(SAMPLES, batch_size=16 * PROCESSES, shuffle=True, seed=0, rank=rank, world_size=PROCESSES)
        for rank in range(PROCESSES)
    ]
    began = time.perf_counter()
    batches = list(orders[0])
    print(f"the batches of process 0: {len(batches)}, in {time.perf_counter() - began:.2f} s")
    first = [next(iter(order)) for order in orders]
    together = {index for indices in first for index in indices}
    alone = next(iter(BatchSampler(SAMPLES, batch_size=16 * PROCESSES, shuffle=True, seed=0)))
    same = "the same" if together == set(alone) else "NOT the same"
    print(
        f"the first batch of all {PROCESSES}: {len(together):,} different samples, {same} as those of one process alone"
    )


if __name__ == "__main__":
    main()
