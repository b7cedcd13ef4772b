"""Real processes: the same samples in each global batch, augmented alike, on one and on several of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# The world size that is compared with one process, and the overrides; tests/runs/test_processes.py compares world
# sizes 1, 2 and 4 with the default data.
CASES = {
    # everything that could depend on how a batch is shared out
    "digits": (
        2,
        *("norm=groupnorm", "data/augment=crop_flip", "data.augment.crop_padding=1", "data.augment.mixup=0.5"),
        *("data.augment.cutmix=1", "data.augment.cutout=2", "data.classes_per_batch=4", "data.micro_batch_size=6"),
    ),
    # 27 validation samples in batches of 24: the last has one for each of three processes, and none for the fourth
    "japanese_vowels": (
        *(4, "model=rnn", "data=japanese_vowels", "norm=layernorm", "data.batch_size=24", "data.micro_batch_size=3"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_several_processes_train_as_one(
    command: Callable[..., Any],
    run: Callable[..., Any],
    last_weights: Callable[..., Any],
    tmp_path: Path,
    case: str,
) -> None:
    several, *words = CASES[case]
    results = {}
    for processes in (1, several):
        short = ("trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.precision=64-true")
        short += ("logger=csv", f"output_dir={tmp_path}/on{processes}")
        if processes == 1:
            run("trainer=cpu", *words, *short)
        else:
            many = ("trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={processes}")
            done = command(*many, *words, *short)
            assert done.returncode == 0, done.stderr
        [file] = (tmp_path / f"on{processes}").glob("*/run.json")
        results[processes] = (json.loads(file.read_text()), last_weights(file.parent))
    record, expected = results[1]
    other, weights = results[several]
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert other["data"] == record["data"]
    # over exactly the samples of the test part, none twice: 360 and 370 divide by neither 32 nor 4 x 8
    assert other["metrics"]["test/loss"] == pytest.approx(record["metrics"]["test/loss"], rel=1e-6)
    assert other["metrics"]["test/accuracy"] == pytest.approx(record["metrics"]["test/accuracy"], abs=1e-7)
