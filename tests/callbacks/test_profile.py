"""What a profile says of a run, and that it changes nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.runs import wandb_file
from torch import nn

from ablab.callbacks.flops import count_flops
from ablab.callbacks.profile import choose_steps, gpu_time_by_phase
from ablab.data.batch import Batch

Run = Callable[..., SimpleNamespace]
LENGTH = (
    "trainer.max_epochs=2",
    "trainer.max_steps=24",
    "trainer.limit_train_batches=18",
    "trainer.limit_val_batches=1",
)


def record(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return read


def rows(folder: Path) -> str:
    return (folder / "metrics.csv").read_text()


def test_a_profiled_run_is_the_same_run_and_says_where_its_time_went(run: Run) -> None:
    words = (*LENGTH, "data.micro_batch_size=20", "+callbacks/measure=drift", "trainer.log_every_n_steps=1")
    plain, profiled = run(*words), run(*words, "trainer.profile=true")
    there, here = record(plain.folder), record(profiled.folder)
    assert here["weights_sha256"] == there["weights_sha256"]
    assert here["identity"] == there["identity"]
    assert rows(profiled.folder) == rows(plain.folder)
    found = here["profile"]
    assert found["steps"] == {"timed": [8, 15], "traced": [16, 23]}
    assert found["samples_per_step"] == 32
    assert sum(found["host_ms"].values()) == pytest.approx(found["step_ms"], rel=1e-6)
    assert found["host_ms"].keys() >= {"data", "forward", "backward", "optimizer", "callback NonFinite", "rest"}
    assert all(spent > 0 for spent in found["host_ms"].values())
    assert found["flops_share"] == pytest.approx(found["flops_per_step"] / found["step_ms"] * 1000 / found["peak"])
    table = (profiled.folder / "profile" / "table.txt").read_text()
    assert table in profiled.printed
    assert "profile of steps 8 to 15 on cpu" in table
    assert "aten::convolution_backward" in table
    events = json.loads((profiled.folder / "profile" / "trace.json").read_text())["traceEvents"]
    parts = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert parts.count("backward") >= 2 * 8, "of both parts of each batch"


def test_a_run_that_is_gone_on_with_is_profiled_from_there(run: Run, stop: Callable[..., Path | None]) -> None:
    words = (*LENGTH, "trainer.log_every_n_steps=1")
    whole = run(*words)
    folder = stop("training_step", 12, *words, "trainer.profile=true")
    assert folder is not None
    resumed = run(f"resume={folder}", *words, "trainer.profile=true")
    assert record(folder)["weights_sha256"] == record(whole.folder)["weights_sha256"]
    assert rows(folder) == rows(whole.folder)
    assert "profile of steps 16 to 19" in resumed.printed


def test_a_single_step_is_timed_and_traced_at_once(run: Run) -> None:
    done = run("trainer.profile=true", "model=transformer", "data=text", "data.context_length=16")
    assert record(done.folder)["profile"]["steps"] == {"timed": [0, 0], "traced": [0, 0]}
    assert "profile of step 0 on cpu" in done.printed


@pytest.mark.slow
def test_of_two_processes_the_first_is_profiled(run: Run) -> None:
    words = ("trainer=ddp_cpu", "norm=groupnorm", *LENGTH)
    plain, profiled = run(*words), run(*words, "trainer.profile=true")
    assert record(profiled.folder)["weights_sha256"] == record(plain.folder)["weights_sha256"]
    assert record(profiled.folder)["profile"]["samples_per_step"] == 16
    assert profiled.printed.count("profile of steps") == 1


@pytest.mark.slow
def test_wandb_has_the_profile_in_its_config_and_no_row_more(run: Run) -> None:
    words = (*LENGTH, "logger=wandb", "logger.wandb.mode=offline")
    plain, profiled = run(*words), run(*words, "trainer.profile=true")
    assert rows(profiled.folder) == rows(plain.folder)
    [file] = (profiled.folder / "wandb").glob("offline-run-*/*.wandb")
    assert wandb_file.config(file)["profile"]["flops_per_step"] > 0


@pytest.mark.parametrize(
    ("left", "timed", "traced"),
    [
        (float("inf"), range(10, 20), range(20, 30)),
        (30.0, range(10, 20), range(20, 30)),
        (24.0, range(8, 16), range(16, 24)),
        (2.0, range(1), range(1, 2)),
        (1.0, range(1), range(1)),
    ],
)
def test_short_runs_have_fewer_steps_of_each_kind(left: float, timed: range, traced: range) -> None:
    assert choose_steps(left) == (timed, traced)


def test_operations_of_products_are_counted_once_forward_and_once_for_each_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    needed = count_flops(model, Batch(torch.ones(16, 8), torch.zeros(16, dtype=torch.long)))
    first, second = 2 * 16 * 8 * 4, 2 * 16 * 4 * 2
    assert needed.forward == first + second
    assert needed.modules == {"0": first, "1": second}
    assert needed.step == 2 * first + 3 * second, "nobody wants the gradient of the inputs"


def test_work_on_a_gpu_belongs_to_the_part_that_launched_it() -> None:
    def event(category: str, name: str, start: float, length: float, **more: Any) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": length, "args": more}

    events = [
        event("user_annotation", "optimizer", 0, 100),
        event("user_annotation", "forward", 10, 20),
        event("user_annotation", "backward", 40, 20),
        event("cuda_runtime", "cudaLaunchKernel", 15, 1, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 45, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 90, 1, correlation=3),
        event("cuda_runtime", "cudaMemcpyAsync", 150, 1, correlation=4),
        event("kernel", "conv", 50, 4000, correlation=1),
        event("kernel", "conv", 5000, 6000, correlation=2),
        event("kernel", "add", 12000, 500, correlation=3),
        event("gpu_memcpy", "copy", 13000, 250, correlation=4),
    ]
    assert gpu_time_by_phase(events) == {"forward": 4.0, "backward": 6.0, "optimizer": 0.5, "rest": 0.25}
