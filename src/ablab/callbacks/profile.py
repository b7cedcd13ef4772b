"""Profile training steps: time per phase, per operation, and throughput relative to the device's peak."""

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

from ablab.callbacks.flops import Flops, count_flops, measure_peak, synchronize
from ablab.disk import write_text
from ablab.tasks.task import Task

STEPS = 10  # number of warm-up, timed and traced steps each
NUM_ROWS = 10  # maximum number of rows per table
LARGE = 16 * 2**20  # size in bytes above which a trace is compressed
PHASES = ("data", "forward", "backward", "optimizer")
CALLBACK = "callback "  # prefix of the phases of callbacks
REST = "rest"  # Lightning's loop and the loggers
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


class Operation(NamedTuple):
    """An operator with its calls and self time per step."""

    name: str
    calls: float
    milliseconds: float


class Profile(L.Callback):
    """Profile a few training steps, print the result and write it to the folder `profile` of the run.

    After 10 warm-up steps, 10 steps are timed without instrumentation, and 10 more are traced with torch's profiler,
    which slows the host; shorter runs have fewer of each. A step lasts from the request for its batch to the request
    for the next; validations are excluded. Profiling does not change the results of the run.

    `trace.json` opens in chrome://tracing or ui.perfetto.dev, and `table.txt` is the printed report. `found` is stored
    in run.json and the loggers' configs rather than as metrics, which a resumed run would lose.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.clock: Clock | None = None
        self.num_samples = 0
        self.flops: Flops | str = ""  # or the reason why they could not be counted

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        left = float(trainer.estimated_stepping_batches) - trainer.global_step
        if trainer.is_global_zero and left > 0:
            self.clock = Clock(trainer, *choose_steps(left))
            self.clock.begin()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any) -> None:
        if self.clock is None or self.num_samples:
            return
        assert isinstance(pl_module, Task)
        self.num_samples = len(batch.targets)
        try:
            self.flops = count_flops(pl_module.model, batch)
        except ValueError as error:
            self.flops = str(error)

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if self.clock is not None and self.clock.is_over:
            self.report(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.report(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        clock, self.clock = self.clock, None
        if clock is not None:
            clock.end()

    def report(self, trainer: L.Trainer) -> None:
        """Stop profiling, and write and print the results."""
        clock, self.clock = self.clock, None
        if clock is None:
            return
        clock.end()
        if not clock.num_timed:
            return
        folder = Path(trainer.loggers[0].save_dir or ".") / "profile"
        folder.mkdir(exist_ok=True)
        on_device = {} if clock.trace is None else write_trace(clock.trace, folder)
        operations = [] if clock.trace is None else top_operations(clock.trace, clock.num_traced)
        device = trainer.strategy.root_device
        dtype = DTYPES.get(str(trainer.precision).partition("-")[0], torch.float32)
        peak = measure_peak(device, dtype)
        seconds = clock.total / clock.num_timed
        self.found = {
            "device": device_name(trainer),
            "steps": clock.steps,
            "step_ms": 1000 * seconds,
            "host_ms": {phase: 1000 * spent / clock.num_timed for phase, spent in clock.spent.items()},
            "device_ms": {phase: spent / clock.num_traced for phase, spent in on_device.items()},
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
        text = format_report(self.found, operations, self.flops)
        write_text(folder / "table.txt", text + "\n")
        print(f"\n{text}\n", flush=True)
        for logger in trainer.loggers:
            logger.log_hyperparams({"profile": self.found})


def device_name(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {trainer.precision}"
    return f"{device.type}, threads: {torch.get_num_threads()}, {trainer.precision}"


def choose_steps(left: float) -> tuple[range, range]:
    """Return the steps to time and the steps to trace, for a number of remaining steps."""
    if left == 1:
        return range(1), range(1)
    warmup = int(min(STEPS, left // 3))
    timed = int(min(STEPS, (left - warmup) // 2))
    traced = int(min(STEPS, left - warmup - timed))
    return range(warmup, warmup + timed), range(warmup + timed, warmup + timed + traced)


# Time per phase of a step -----------------------------------------------------------------------------------------


class Clock(Profiler):
    """A Lightning profiler that measures the self time of each action.

    Args:
        trainer: the trainer to profile.
        timed, traced: the steps to time and to trace, counted from the start of profiling.
    """

    def __init__(self, trainer: L.Trainer, timed: range, traced: range) -> None:
        super().__init__()
        self.trainer = trainer
        self.timed = timed
        self.traced = traced
        self.first = trainer.global_step
        self.number = -1  # index of the current step
        self.in_step = False
        self.stack: list[str] = []
        self.marks: list[Any] = []  # open record_function contexts of the trace
        self.spent: dict[str, float] = {}  # seconds per phase
        self.total = 0.0
        self.num_timed = self.num_traced = 0
        self.since = 0.0
        self.trace: profile | None = None
        self.tracing = False

    @property
    def is_over(self) -> bool:
        return self.number + 1 >= max(self.timed.stop, self.traced.stop)

    @property
    def steps(self) -> dict[str, list[int]]:
        """The first and last step of each window that was reached."""
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

        def timed_backward(*arguments: Any, **settings: Any) -> Any:  # tasks call it directly for micro-batches
            with self.profile("backward"):
                return backward(*arguments, **settings)

        strategy.backward = timed_backward

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
        phase = phase_of(action_name) or (self.stack[-1] if self.stack else REST)
        if self.tracing:
            self.marks.append(record_function(phase).__enter__() if phase_of(action_name) else None)
        self.stack.append(phase)

    def stop(self, action_name: str) -> None:
        self.lap()
        if self.stack:
            self.stack.pop()
        if self.marks and (mark := self.marks.pop()) is not None:
            mark.__exit__(None, None, None)

    def lap(self) -> None:
        """Add the time since the last call to the current phase."""
        now = time.perf_counter()
        if self.in_step and self.number in self.timed:
            phase = self.stack[-1] if self.stack else REST
            self.spent[phase] = self.spent.get(phase, 0.0) + now - self.since
        self.since = now

    def start_step(self) -> None:
        self.number += 1
        if self.tracing and self.number not in self.traced:
            self.stop_trace()
        if not self.tracing and self.number in self.traced:
            self.trace = profile(activities=activities(self.trainer.strategy.root_device))
            with hide_profiler_messages():
                self.trace.start()
            self.tracing = True
        if self.number in self.timed:
            synchronize(self.trainer.strategy.root_device)
        self.began = self.since = time.perf_counter()
        self.in_step = True

    def stop_step(self) -> None:
        if not self.in_step:
            return
        if self.number in self.timed:
            synchronize(self.trainer.strategy.root_device)
            self.lap()
            self.total += self.since - self.began
            self.num_timed += 1
        self.num_traced += self.number in self.traced
        self.in_step = False

    def stop_trace(self) -> None:
        if self.tracing and self.trace is not None:
            synchronize(self.trainer.strategy.root_device)
            with hide_profiler_messages():
                self.trace.stop()
        self.tracing, self.marks = False, []


def phase_of(action: str) -> str | None:
    """Return the phase that a Lightning action starts, or None if it belongs to the enclosing phase."""
    owner, name = action.rpartition(".")[::2]
    if owner.startswith("[Callback]") and owner != "[Callback]TaskHooks":  # TaskHooks belong to the task
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
def hide_profiler_messages() -> Iterator[None]:
    """Hide the messages that torch's profiler prints from C++ when it starts and stops; errors are still shown."""
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


def write_trace(trace: profile, folder: Path) -> dict[str, float]:
    """Write a trace, compressed if large, and return the GPU time per phase in milliseconds."""
    path = folder / "trace.json"
    packed = path.with_suffix(".json.gz")
    packed.unlink(missing_ok=True)  # left by an earlier process of the run
    trace.export_chrome_trace(str(path))
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    if path.stat().st_size > LARGE:
        with path.open("rb") as plain, gzip.open(packed, "wb") as file:
            file.write(plain.read())
        path.unlink()
    return gpu_time_by_phase(events)


def gpu_time_by_phase(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return GPU time in milliseconds per phase, attributed by launch time.

    Args:
        events: events of a Chrome trace. Matched by time rather than by thread, since the backward pass launches its
            kernels from another thread while the step waits.
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
    phases = [event for event in of_category.get("user_annotation", []) if is_phase(event["name"])]
    found: dict[str, float] = {}
    for kind in ("kernel", "gpu_memcpy", "gpu_memset"):
        for event in of_category.get(kind, []):
            moment = launches.get(event.get("args", {}).get("correlation"), event["ts"])
            around = [phase for phase in phases if phase["ts"] <= moment <= phase["ts"] + phase["dur"]]
            phase = min(around, key=lambda phase: phase["dur"])["name"] if around else REST
            found[phase] = found.get(phase, 0.0) + event["dur"] / 1000
    return found


def is_phase(name: str) -> bool:
    return name in (*PHASES, REST) or name.startswith(CALLBACK)


def top_operations(trace: profile, num_steps: int) -> list[Operation]:
    """Return the operators with the largest self time, on the GPU if there is one."""
    events = [
        event for event in trace.key_averages() if event.device_type == DeviceType.CPU and not is_phase(event.key)
    ]
    on_device = any(event.self_device_time_total for event in events)
    own = [(event.self_device_time_total if on_device else event.self_cpu_time_total, event) for event in events]
    first = sorted(own, key=lambda pair: -pair[0])[:NUM_ROWS]
    return [Operation(event.key, event.count / num_steps, spent / 1000 / num_steps) for spent, event in first]


# Report -----------------------------------------------------------------------------------------------------------


def format_report(found: Mapping[str, Any], operations: list[Operation], flops: Flops | str) -> str:
    """Return the report as text."""
    whole, number = found["step_ms"], found["samples_per_step"]
    head = [
        f"profile of {format_steps(found['steps']['timed'])} on {found['device']}",
        f"a step of {number} samples takes {whole:.2f} ms: {1000 * number / whole:,.0f} samples a second",
    ]
    blocks = [head, phase_table(found), operation_table(found, operations), module_table(found, flops)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def format_steps(window: Sequence[int]) -> str:
    first, last = window
    return f"step {first}" if first == last else f"steps {first} to {last}"


def phase_table(found: Mapping[str, Any]) -> list[str]:
    whole, host, gpu = found["step_ms"], found["host_ms"], found["device_ms"]
    callbacks = sorted(
        (phase for phase in {*host, *gpu} if phase.startswith(CALLBACK)), key=lambda phase: -host.get(phase, 0)
    )

    def row(name: str, *phases: str) -> tuple[str, float, float]:
        return name, sum(host.get(phase, 0.0) for phase in phases), sum(gpu.get(phase, 0.0) for phase in phases)

    each = [row(f"  {phase.removeprefix(CALLBACK)}", phase) for phase in callbacks]
    rows = [
        *(row(phase, phase) for phase in PHASES),
        row("callbacks", *callbacks),
        *(line for line in each if max(line[1:]) >= whole / 200),
        row("rest: the loop, loggers", REST),
    ]
    lines = [f"{'where the time goes':34}{'ms':>9}{'%':>7}" + (f"{'GPU ms':>9}{'%':>7}" if gpu else "")]
    for name, here, there in rows:
        columns = f"{there:9.2f}{100 * there / whole:7.1f}" if gpu else ""
        share = (there if gpu else here) / whole
        lines.append(f"{name:34}{here:9.2f}{100 * here / whole:7.1f}{columns}  {draw_bar(share)}".rstrip())
    columns = f"{sum(gpu.values()):9.2f}{100 * sum(gpu.values()) / whole:7.1f}" if gpu else ""
    lines.append(f"{'a step':34}{whole:9.2f}{100:7.1f}{columns}")
    if gpu:
        lines.append(
            "ms are the host's, which waits for the GPU where it looks at a value; GPU ms are of work launched there"
        )
    return lines


def operation_table(found: Mapping[str, Any], operations: list[Operation]) -> list[str]:
    if not operations:
        return []
    where = "on the GPU" if found["device_ms"] else "on the host"
    lines = [f"{f'operations, own time {where}':34}{'ms':>9}{'calls':>7}"]
    lines += [f"{one.name[:33]:34}{one.milliseconds:9.2f}{one.calls:7.0f}" for one in operations]
    traced = format_steps(found["steps"]["traced"])
    return [*lines, f"in a step, of {traced} under torch's profiler, which slows the host"]


def module_table(found: Mapping[str, Any], flops: Flops | str) -> list[str]:
    if isinstance(flops, str):
        return [f"floating-point operations were not counted: {flops}"]
    lines = [f"{'floating-point operations':34}{'GFLOP':>9}{'%':>7}"]
    largest = sorted(flops.modules, key=lambda name: -flops.modules[name])[:NUM_ROWS]
    shown = {name: number for name, number in flops.modules.items() if name in largest}
    if (elsewhere := flops.forward - sum(shown.values())) > 0:
        shown["elsewhere"] = elsewhere
    for name, number in shown.items():
        share = number / flops.forward
        lines.append(f"{name[:33]:34}{number / 1e9:9.3f}{100 * share:7.1f}  {draw_bar(share)}".rstrip())
    lines.append(f"{'forward':34}{flops.forward / 1e9:9.3f}{100:7.1f}")
    lines.append(f"{'forward and backward':34}{flops.step / 1e9:9.3f}")
    return [
        *lines,
        f"reached: {found['flops_per_second'] / 1e9:,.1f} GFLOP/s, {100 * found['flops_share']:.1f} % of the peak, "
        f"{found['peak'] / 1e9:,.1f} GFLOP/s",
        f"the peak is what a large matrix product in {found['peak_dtype']} reaches, measured here and now",
    ]


def draw_bar(share: float) -> str:
    """Draw a fraction as a bar of at most twenty characters."""
    whole, eighths = divmod(round(160 * min(1.0, share)), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()
