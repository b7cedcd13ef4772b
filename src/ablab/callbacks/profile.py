"""Where the time of a training step goes: by its parts, by operations, and against what the device can do."""

from __future__ import annotations

import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.profilers import Profiler
from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from ablab.callbacks.flops import Flops, flops_of, measured_peak, synchronize
from ablab.disk import write_text
from ablab.tasks.task import Task

STEPS = 10  # of the warm-up, of those that are timed, and of those that are traced
NUM_ROWS = 10  # of a table, at most
LARGE = 16 * 2**20  # bytes from which on a trace is compressed
PARTS = ("data", "forward", "backward", "optimizer")
CALLBACK = "callback "  # begins the name of the part that a callback is
REST = "rest"  # Lightning's loop and the loggers
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


class Operation(NamedTuple):
    """An operation of a step: how often it is called, and its own time."""

    name: str
    calls: float
    milliseconds: float


class Profile(L.Callback):
    """Writes what a few steps spend their time on into the folder `profile` of the run, and prints it.

    After ten steps to warm up, ten are timed as they are, and ten more are traced by torch's profiler, which slows the
    host; a shorter run has fewer of each. A step lasts from the moment that it asks for its batch to that of the next
    step; validations do not count. Nothing that the run computes changes.

    `trace.json` opens in chrome://tracing or ui.perfetto.dev, `table.txt` is for a person, `found` for run.json and the
    loggers' configs: a row of metrics would not be there in a resumed run.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.clock: Clock | None = None
        self.num_samples = 0
        self.flops: Flops | str = ""  # or why they were not counted

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        left = float(trainer.estimated_stepping_batches) - trainer.global_step
        if trainer.is_global_zero and left > 0:
            self.clock = Clock(trainer, *windows(left))
            self.clock.begin()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any) -> None:
        if self.clock is None or self.num_samples:
            return
        assert isinstance(pl_module, Task)
        self.num_samples = len(batch.targets)
        try:
            self.flops = flops_of(pl_module.model, batch)
        except ValueError as error:
            self.flops = str(error)

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if self.clock is not None and self.clock.over:
            self.report(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        clock, self.clock = self.clock, None
        if clock is not None:
            clock.end()

    def report(self, trainer: L.Trainer) -> None:
        """Stop looking, and tell what was found."""
        clock, self.clock = self.clock, None
        if clock is None:
            return
        clock.end()
        if not clock.num_timed:
            return
        folder = Path(trainer.loggers[0].save_dir or ".") / "profile"
        folder.mkdir(exist_ok=True)
        on_device = {} if clock.trace is None else written(clock.trace, folder)
        operations = [] if clock.trace is None else busiest(clock.trace, clock.num_traced)
        device = trainer.strategy.root_device
        dtype = DTYPES.get(str(trainer.precision).partition("-")[0], torch.float32)
        peak = measured_peak(device, dtype)
        seconds = clock.total / clock.num_timed
        self.found = {
            "device": device_name(trainer),
            "steps": clock.steps,
            "step_ms": 1000 * seconds,
            "host_ms": {part: 1000 * spent / clock.num_timed for part, spent in clock.spent.items()},
            "device_ms": {part: spent / clock.num_traced for part, spent in on_device.items()},
            "samples_per_step": self.num_samples,
            "peak": peak,
            "peak_dtype": str(dtype).removeprefix("torch."),
        }
        if isinstance(self.flops, Flops):
            reached = self.flops.step / seconds
            self.found |= {
                "flops_per_step": self.flops.step,
                "flops_per_second": reached,
                "flops_share": reached / peak,
            }
        text = table(self.found, operations, self.flops)
        write_text(folder / "table.txt", text + "\n")
        print(f"\n{text}\n", flush=True)
        for logger in trainer.loggers:
            logger.log_hyperparams({"profile": self.found})


def device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {trainer.precision}"
    return f"{device.type}, threads: {torch.get_num_threads()}, {trainer.precision}"


def windows(left: float) -> tuple[range, range]:
    """The steps that are timed and those that are traced, of so many that are left; of a single one, both."""
    if left == 1:
        return range(1), range(1)
    warmup = int(min(STEPS, left // 3))
    timed = int(min(STEPS, (left - warmup) // 2))
    traced = int(min(STEPS, left - warmup - timed))
    return range(warmup, warmup + timed), range(warmup + timed, warmup + timed + traced)


# A step's time by its parts ---------------------------------------------------------------------------------------


class Clock(Profiler):
    """Stands in for Lightning's profiler, which is told of each of its actions, and takes their own times.

    Args:
        trainer: whose training is looked at.
        timed, traced: the numbers of the steps, from the first that it sees.
    """

    def __init__(self, trainer: L.Trainer, timed: range, traced: range) -> None:
        super().__init__()
        self.trainer = trainer
        self.timed = timed
        self.traced = traced
        self.first = trainer.global_step
        self.number = -1  # of the step that goes on
        self.going_on = False
        self.stack: list[str] = []
        self.marks: list[Any] = []  # the parts as the trace shows them
        self.spent: dict[str, float] = {}  # seconds of each part
        self.total = 0.0
        self.num_timed = self.num_traced = 0
        self.since = 0.0
        self.trace: profile | None = None
        self.tracing = False

    @property
    def over(self) -> bool:
        return self.number + 1 >= max(self.timed.stop, self.traced.stop)

    @property
    def steps(self) -> dict[str, list[int]]:
        """The first and the last step of each window, as far as it was reached."""
        counts = {"timed": (self.timed, self.num_timed), "traced": (self.traced, self.num_traced)}
        return {
            name: [self.first + window.start, self.first + window.start + number - 1]
            for name, (window, number) in counts.items()
            if number
        }

    def begin(self) -> None:
        strategy: Any = self.trainer.strategy
        self.before, self.trainer.profiler = self.trainer.profiler, self  # type: ignore[attr-defined]
        backward = strategy.backward

        def told(*arguments: Any, **settings: Any) -> Any:  # the task calls it for parts of a batch, past Lightning
            with self.profile("backward"):
                return backward(*arguments, **settings)

        strategy.backward = told

    def end(self) -> None:
        strategy: Any = self.trainer.strategy
        self.stop_step()
        self.stop_trace()
        self.trainer.profiler = self.before  # type: ignore[attr-defined]
        del strategy.backward

    def start(self, action_name: str) -> None:
        name = action_name.rpartition(".")[2]
        if name == "train_dataloader_next":
            self.stop_step()
            self.start_step()
        elif "validation" in name or name == "on_train_epoch_end":
            self.stop_step()
        self.lap()
        part = part_of(action_name) or (self.stack[-1] if self.stack else REST)
        if self.tracing:
            self.marks.append(record_function(part).__enter__() if part_of(action_name) else None)
        self.stack.append(part)

    def stop(self, action_name: str) -> None:
        self.lap()
        if self.stack:
            self.stack.pop()
        if self.marks and (mark := self.marks.pop()) is not None:
            mark.__exit__(None, None, None)

    def lap(self) -> None:
        """Count the time since the last look towards the part that is in hand."""
        now = time.perf_counter()
        if self.going_on and self.number in self.timed:
            part = self.stack[-1] if self.stack else REST
            self.spent[part] = self.spent.get(part, 0.0) + now - self.since
        self.since = now

    def start_step(self) -> None:
        self.number += 1
        if self.tracing and self.number not in self.traced:
            self.stop_trace()
        if not self.tracing and self.number in self.traced:
            self.trace = profile(activities=activities(self.trainer.strategy.root_device))
            with without_chatter():
                self.trace.start()
            self.tracing = True
        if self.number in self.timed:
            synchronize(self.trainer.strategy.root_device)
        self.began = self.since = time.perf_counter()
        self.going_on = True

    def stop_step(self) -> None:
        if not self.going_on:
            return
        if self.number in self.timed:
            synchronize(self.trainer.strategy.root_device)
            self.lap()
            self.total += self.since - self.began
            self.num_timed += 1
        self.num_traced += self.number in self.traced
        self.going_on = False

    def stop_trace(self) -> None:
        if self.tracing and self.trace is not None:
            synchronize(self.trainer.strategy.root_device)
            with without_chatter():
                self.trace.stop()
        self.tracing, self.marks = False, []


def part_of(action: str) -> str | None:
    """The part of a step that one of Lightning's actions begins, or None for what belongs to the one around it."""
    owner, name = action.rpartition(".")[::2]
    if owner.startswith("[Callback]") and owner != "[Callback]TaskHooks":  # which are the task's, not a person's choice
        return CALLBACK + owner.removeprefix("[Callback]").partition("{")[0]
    if name == "train_dataloader_next" or "batch_transfer" in name or "batch_to_device" in name:
        return "data"
    if name == "backward":
        return "backward"
    if name == "training_step":
        return "forward"
    if name in ("optimizer_step", "configure_gradient_clipping", "lr_scheduler_step"):
        return "optimizer"
    return REST if name.startswith("on_") else None


def activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


@contextmanager
def without_chatter() -> Iterator[None]:
    """Keep from the screen what torch's profiler says in C++ each time that it starts and stops; errors are shown."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        before = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            os.write(2, b"".join(line for line in kept if not line.startswith(b"USDT:")))


# The trace --------------------------------------------------------------------------------------------------------


def written(trace: profile, folder: Path) -> dict[str, float]:
    """Write a trace, compressed where it is large; milliseconds on the GPU of what each part has launched."""
    path = folder / "trace.json"
    packed = path.with_suffix(".json.gz")
    packed.unlink(missing_ok=True)  # of an earlier process of the run
    trace.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    if path.stat().st_size > LARGE:
        with path.open("rb") as plain, gzip.open(packed, "wb") as file:
            file.write(plain.read())
        path.unlink()
    return launched_by(events)


def launched_by(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of work on the GPU by the part of the step that went on when it was launched.

    Args:
        events: of a trace; backward passes launch theirs from a thread of their own, while the step waits.
    """
    of_category: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        of_category.setdefault(event.get("cat", ""), []).append(event)
    launches = {
        event["args"]["correlation"]: event["ts"]
        for kind in ("cuda_runtime", "cuda_driver")
        for event in of_category.get(kind, [])
        if "correlation" in event.get("args", {})
    }
    parts = [event for event in of_category.get("user_annotation", []) if is_part(event["name"])]
    found: dict[str, float] = {}
    for kind in ("kernel", "gpu_memcpy", "gpu_memset"):
        for event in of_category.get(kind, []):
            moment = launches.get(event.get("args", {}).get("correlation"), event["ts"])
            around = [part for part in parts if part["ts"] <= moment <= part["ts"] + part["dur"]]
            part = min(around, key=lambda part: part["dur"])["name"] if around else REST
            found[part] = found.get(part, 0.0) + event["dur"] / 1000
    return found


def is_part(name: str) -> bool:
    return name in (*PARTS, REST) or name.startswith(CALLBACK)


def busiest(trace: profile, num_steps: int) -> list[Operation]:
    """The operations with most time of their own, on the GPU where there is one."""
    events = [event for event in trace.key_averages() if event.device_type == DeviceType.CPU and not is_part(event.key)]
    on_device = any(event.self_device_time_total for event in events)
    own = [(event.self_device_time_total if on_device else event.self_cpu_time_total, event) for event in events]
    first = sorted(own, key=lambda pair: -pair[0])[:NUM_ROWS]
    return [Operation(event.key, event.count / num_steps, spent / 1000 / num_steps) for spent, event in first]


# For a person -----------------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any], operations: list[Operation], flops: Flops | str) -> str:
    """All that was found, for a screen."""
    whole, number = found["step_ms"], found["samples_per_step"]
    head = [
        f"profile of {spoken(found['steps']['timed'])} on {found['device']}",
        f"a step of {number} samples takes {whole:.2f} ms: {1000 * number / whole:,.0f} samples a second",
    ]
    blocks = [head, by_parts(found), by_operations(found, operations), by_modules(found, flops)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def spoken(window: Sequence[int]) -> str:
    first, last = window
    return f"step {first}" if first == last else f"steps {first} to {last}"


def by_parts(found: Mapping[str, Any]) -> list[str]:
    whole, host, gpu = found["step_ms"], found["host_ms"], found["device_ms"]
    callbacks = sorted(
        (part for part in {*host, *gpu} if part.startswith(CALLBACK)), key=lambda part: -host.get(part, 0)
    )

    def row(name: str, *parts: str) -> tuple[str, float, float]:
        return name, sum(host.get(part, 0.0) for part in parts), sum(gpu.get(part, 0.0) for part in parts)

    each = [row(f"  {part.removeprefix(CALLBACK)}", part) for part in callbacks]
    rows = [
        *(row(part, part) for part in PARTS),
        row("callbacks", *callbacks),
        *(line for line in each if max(line[1:]) >= whole / 200),
        row("rest: the loop, loggers", REST),
    ]
    lines = [f"{'where the time goes':34}{'ms':>9}{'%':>7}" + (f"{'GPU ms':>9}{'%':>7}" if gpu else "")]
    for name, here, there in rows:
        columns = f"{there:9.2f}{100 * there / whole:7.1f}" if gpu else ""
        share = (there if gpu else here) / whole
        lines.append(f"{name:34}{here:9.2f}{100 * here / whole:7.1f}{columns}  {bar(share)}".rstrip())
    columns = f"{sum(gpu.values()):9.2f}{100 * sum(gpu.values()) / whole:7.1f}" if gpu else ""
    lines.append(f"{'a step':34}{whole:9.2f}{100:7.1f}{columns}")
    if gpu:
        lines.append(
            "ms are the host's, which waits for the GPU where it looks at a value; GPU ms are of work launched there"
        )
    return lines


def by_operations(found: Mapping[str, Any], operations: list[Operation]) -> list[str]:
    if not operations:
        return []
    where = "on the GPU" if found["device_ms"] else "on the host"
    lines = [f"{f'operations, own time {where}':34}{'ms':>9}{'calls':>7}"]
    lines += [f"{one.name[:33]:34}{one.milliseconds:9.2f}{one.calls:7.0f}" for one in operations]
    traced = spoken(found["steps"]["traced"])
    return [*lines, f"in a step, of {traced} under torch's profiler, which slows the host"]


def by_modules(found: Mapping[str, Any], flops: Flops | str) -> list[str]:
    if isinstance(flops, str):
        return [f"floating-point operations were not counted: {flops}"]
    lines = [f"{'floating-point operations':34}{'GFLOP':>9}{'%':>7}"]
    largest = sorted(flops.modules, key=lambda name: -flops.modules[name])[:NUM_ROWS]
    shown = {name: number for name, number in flops.modules.items() if name in largest}
    if (elsewhere := flops.forward - sum(shown.values())) > 0:
        shown["elsewhere"] = elsewhere
    for name, number in shown.items():
        share = number / flops.forward
        lines.append(f"{name[:33]:34}{number / 1e9:9.3f}{100 * share:7.1f}  {bar(share)}".rstrip())
    lines.append(f"{'forward':34}{flops.forward / 1e9:9.3f}{100:7.1f}")
    lines.append(f"{'forward and backward':34}{flops.step / 1e9:9.3f}")
    return [
        *lines,
        f"reached: {found['flops_per_second'] / 1e9:,.1f} GFLOP/s, {100 * found['flops_share']:.1f} % of the peak, "
        f"{found['peak'] / 1e9:,.1f} GFLOP/s",
        f"the peak is what a large matrix product in {found['peak_dtype']} reaches, measured here and now",
    ]


def bar(share: float) -> str:
    """A share as a bar of at most twenty characters."""
    whole, eighths = divmod(round(160 * min(1.0, share)), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()
