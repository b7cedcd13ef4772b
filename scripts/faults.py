"""Kill runs at random, resume them until they finish, and check that the results are equal to the bit.

    python scripts/faults.py                                 100 kills (SIGKILL) over models, workers and processes
    python scripts/faults.py --kills 0 --signals 30          30 of each signal that stops a run in order
    python scripts/faults.py --kills 0 --ranks 20 --processes 2 4
                                                             one process of a run fails: 20 errors, kills and hangs each
    python scripts/faults.py --kills 0 --restarts 20 --processes 2 4
                                                             one worker is killed, trainer.max_restarts=1 does the rest
    python scripts/faults.py --kills 6 --models rnn --workers 0 --processes 1
    python scripts/faults.py --kills 10 --ablation norm_batch_size trainer.max_epochs=1
                                                             a whole ablation, killed and started again

A kill hits all processes of a run at once, like a failing machine: in a training step, in validation, in the test, in
each part of writing a checkpoint, while the metrics are written, or at any moment. A run is killed several times, then
left alone. If a single process fails (--ranks), all others must end with an exit code. The metrics.csv, final metrics
and weight hashes are then compared with those of an undisturbed run. Exit code 1: some run differed.

"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAULT = "ABLAB_FAULT"  # EVENT:COUNT, for a process that will kill itself
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STOPPED = 75
TRAINING_SECONDS = 1.5  # approximate duration of a short run, without imports

SHORT = [
    *("logger=csv", "trainer.max_epochs=3", "trainer.limit_train_batches=6", "trainer.val_check_interval=2"),
    *("trainer.limit_val_batches=3", "trainer.limit_test_batches=2", "trainer.log_every_n_steps=1"),
]
# Models with features that have state or draw random numbers: augmentation, dropout, averages, micro-batches.
MODELS = {
    "resnet": ["data/augment=crop_flip", "data.augment.mixup=0.2", "callbacks=ema", "callbacks.ema.decay=0.9"],
    "transformer": [
        *("model=transformer", "data=text", "data.context_length=16", "model.dropout=0.1", "data.micro_batch_size=10"),
        *("callbacks.samples.num_tokens=10", "scheduler.warmup_steps=4", "callbacks.checkpoints.every_n_steps=1"),
    ],
    "rnn": ["model=rnn", "model.num_layers=2", "model.dropout=0.2", "scheduler=one_cycle", "data.classes_per_batch=4"],
}
FAILURES = ("raise", "SIGKILL", "SIGSTOP")
RESTARTED = "restarted"  # a failure of one worker that the run ends by itself
ANSWER = 20  # seconds that a process waits for others
LIMIT = ANSWER + 60  # seconds from a failure to the end of all processes

# Places for a kill, and how many times a short run passes each.
EVENTS = {"training": 18, "validation": 20, "writing": 11, "before the rename": 11, "after the rename": 11}
EVENTS |= {"metrics": 11, "test": 2, "any moment": 100}


# The victim -----------------------------------------------------------------------------------------------------------


def kill_self_at(event: str, count: int) -> None:
    """Kill this process and all of its run when it reaches a place for the count-th time."""
    import torch

    from ablab.lab.loggers.csv_file import MetricsCSV
    from ablab.tasks.task import Task

    def kill() -> None:
        for pid in processes_of_session(os.getsid(0)):
            if pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the signal is on its way

    def killing(owner: Any, name: str, *, after: bool = False) -> None:
        original, passed = getattr(owner, name), Counter[str]()

        def replacement(*arguments: Any, **keywords: Any) -> Any:
            passed["times"] += 1
            if passed["times"] < count or after:
                result = original(*arguments, **keywords)
            if passed["times"] >= count:
                kill()
            return result

        setattr(owner, name, replacement)

    def write_half(state: Any, file: Any, **keywords: Any) -> None:
        save(state, file, **keywords)
        if isinstance(file, io.BytesIO):  # not a file: tensors sent to another process
            return
        written["times"] += 1
        if written["times"] >= count:
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)
            kill()

    save, written = torch.save, Counter[str]()
    match event:
        case "training":
            killing(Task, "micro_batch_loss", after=count % 2 == 0)
        case "validation":
            killing(Task, "validation_step")
        case "test":
            killing(Task, "test_step")
        case "metrics":
            killing(MetricsCSV, "save", after=count % 2 == 0)
        case "writing":
            torch.save = write_half
        case "before the rename":
            killing(os, "replace")
        case "after the rename":
            killing(os, "replace", after=True)
        case "any moment":  # within three seconds of the start of training
            original = Task.on_train_start

            def start(self: Task) -> None:
                original(self)
                threading.Timer(0.03 * count, kill).start()

            Task.on_train_start = start  # type: ignore[method-assign]


# The harness ----------------------------------------------------------------------------------------------------------


class Harness:
    """Starts runs in a folder, disturbs them, and compares their results.

    Args:
        folder: for the runs.
        seed: of the random disturbances.
        tell: receives a line for each run.
    """

    def __init__(self, folder: Path, *, seed: int = 0, tell: Any = print) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.tell = tell
        self.seconds: dict[tuple[str, ...], float] = {}  # duration of an undisturbed run
        self.span = 0.0  # of these, the current run
        self.slowest = 0.0  # seconds from a process's failure to the end of all
        self.references: dict[tuple[str, ...], dict[str, Any]] = {}

    def start(self, *words: str, fault: str | None = None) -> subprocess.Popen[str]:
        script = ROOT / "train.py" if fault is None else Path(__file__)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if fault is None else {FAULT: fault})}
        here, known = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")  # finds rank_fault
        environment["PYTHONPATH"] = os.pathsep.join([here, *known.split(os.pathsep)])
        return subprocess.Popen(
            [sys.executable, str(script), *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            encoding="utf-8",
        )

    def finish(self, *words: str) -> None:
        """Run to the end, undisturbed.

        Raises:
            RuntimeError: the run failed.
        """
        process = self.start(*words)
        printed, _ = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}\n{printed}")

    def reference(self, words: tuple[str, ...]) -> dict[str, Any]:
        """Return the outcome of an undisturbed run."""
        if words not in self.references:
            place, begun = self.folder / f"reference{len(self.references)}", time.monotonic()
            self.finish(*words, f"output_dir={place}")
            self.seconds[words] = time.monotonic() - begun
            self.references[words] = outcome(only_run(place))
        return self.references[words]

    def disturbed(self, words: tuple[str, ...], name: str, disturb: Any, times: int) -> tuple[str, list[str]]:
        """Disturb a run a number of times, then let it finish.

        Returns:
            The differences from the reference ("" if there are none), and the disturbances.
        """
        expected = self.reference(words)
        self.span = self.seconds[words]
        place, done = self.folder / name, []
        again = [*words, f"output_dir={place}"]
        while len(done) < times:
            event = disturb(again)
            if run := only_run(place):
                again = [f"resume={run}"]
            if event is None:  # the run ended before
                break
            done.append(event)
        if not is_finished(only_run(place)):  # a restarted run is
            self.finish(*again)
        found = outcome(only_run(place))
        return ", ".join(key for key in expected if found.get(key) != expected[key]), done

    def kill(self, words: list[str]) -> str | None:
        """Kill a run at a random place; return None if it ends before it gets there."""
        event = self.random.choice(list(EVENTS))
        count = self.random.randint(1, EVENTS[event])
        process = self.start(*words, fault=f"{event}:{count}")
        printed, _ = process.communicate(timeout=600)
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"killed in {event} ({count}), {words}: exit code {process.returncode}\n{printed}")
        return event if process.returncode else None

    def signal(self, name: str) -> Any:
        """Send a stop signal to a run at a random moment, imports included."""

        def send(words: list[str]) -> str:
            process = self.start(*words)
            if self.random.random() < 0.25:
                time.sleep(self.random.uniform(0, self.span))
            else:  # imports take most of the time of a short run
                wait_for_training(process, Path(words[-1].partition("=")[2]))
                time.sleep(self.random.uniform(0, TRAINING_SECONDS))
            process.send_signal(signal.Signals[name])
            printed, _ = process.communicate(timeout=600)
            if process.returncode == 0:
                return None
            if process.returncode == -signal.Signals[name] and "run  " in printed:
                return None  # it had ended, during interpreter shutdown
            if process.returncode == -signal.Signals[name] and not printed:
                return "before Python was up"
            if process.returncode != STOPPED:
                raise RuntimeError(f"{name}, {words}: exit code {process.returncode}\n{printed}")
            return "in the run" if "run: " in printed else "before the run"

        return send

    def fail(self, how: str, processes: int) -> Any:
        """Make one process of a run fail, and check that all end with an error in time, leaving none behind."""

        def make(words: list[str]) -> str | None:
            rank, step = self.random.randrange(processes), self.random.randrange(18)
            once = self.folder / f"failed{len(list(self.folder.glob('failed*')))}"
            process = self.start(*words, f"trainer.strategy.timeout={ANSWER}", *fault_in(rank, step, how, once))
            while process.poll() is None and not once.exists():
                time.sleep(0.05)
            failed_at = time.monotonic()
            try:
                printed, _ = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)
                raise RuntimeError(f"process {rank} of {processes}, {how}: not over after {LIMIT} s") from error
            self.slowest = max(self.slowest, time.monotonic() - failed_at)
            if process.returncode == 0 or not once.exists():
                raise RuntimeError(f"process {rank} of {processes}, {how}: exit code {process.returncode}\n{printed}")
            if how == "raise" and printed.count(f"RuntimeError: a bug in process {rank}\n") not in (1, 2):
                raise RuntimeError(f"process {rank} of {processes}: its error is not said, or too often\n{printed}")
            time.sleep(0.5)
            if processes_of_session(process.pid):
                raise RuntimeError(f"process {rank} of {processes}, {how}: processes are left behind")
            return f"process {rank} of {processes} before step {step}"

        return make

    def restarted(self, processes: int, killed: int | None = None) -> Any:
        """Kill one worker of a run, by default a random one, and have the run restart its workers and end well."""

        def make(words: list[str]) -> str:
            rank = self.random.randrange(processes) if killed is None else killed
            step = self.random.randrange(1, 18)
            once = self.folder / f"restarted{len(list(self.folder.glob('restarted*')))}"
            self.finish(*words, *fault_in(rank, step, "SIGKILL", once), "trainer.max_restarts=1")
            if not once.exists():
                raise RuntimeError(f"process {rank} of {processes}: it was not killed")
            return f"process {rank} of {processes} before step {step}"

        return make

    def ablation(self, words: list[str], kills: int, processes: int) -> tuple[int, list[str]]:
        """An ablation that is killed again and again, at any moment between its first run and its end.

        Returns:
            The number of runs, and the runs that differ from the undisturbed ones.
        """
        words = [*words, f"hydra.launcher.num_processes={processes}"]
        self.finish(*words, f"output_dir={self.folder / 'reference'}")
        ended = [path.stat().st_mtime for path in self.folder.glob("reference/*/*/run.json")]
        place, span = self.folder / "killed", max(ended) - min(ended)
        for number in range(kills):
            process = self.start(*words, f"output_dir={place}")
            wait_for_training(process, place)
            time.sleep(self.random.uniform(0, span / kills))
            if process.poll() is not None:
                raise RuntimeError(f"the ablation had ended before kill {number + 1}; it is too short for so many")
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            records = [json.loads(path.read_text(encoding="utf-8")) for path in place.glob("*/*/run.json")]
            self.tell(f"kill {number + 1}: {sum(r['status'] == 'finished' for r in records)} runs had finished")
        self.finish(*words, f"output_dir={place}")
        expected, found = (
            {run.parent.name: outcome(run.parent) for run in self.folder.glob(f"{name}/*/*/run.json")}
            for name in ("reference", "killed")
        )
        differ = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        return len(expected), differ


def fault_in(rank: int, step: int, how: str, once: Path) -> list[str]:
    """Return the overrides that have one process of a run fail, see rank_fault.py."""
    fault = {"_target_": "rank_fault.RankFault", "rank": rank, "step": step, "how": how, "once": str(once)}
    return [f"+callbacks.fault.{key}={value}" for key, value in fault.items()]


def wait_for_training(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until a process, or one of its session, has created the folder of a run."""
    while process.poll() is None:
        for record in (*folder.glob("run.json"), *folder.glob("*/run.json"), *folder.glob("*/*/run.json")):
            pid = json.loads(record.read_text(encoding="utf-8")).get("pid", 0)
            if pid == process.pid or session_of(pid) == process.pid:
                return
        time.sleep(0.02)


def is_alive(entry: Path) -> bool:
    """Return whether an entry of /proc is a live process."""
    try:
        return (
            entry.name.isdigit() and (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
        )
    except OSError:
        return False


def processes_of_session(session: int) -> list[int]:
    """Return the processes of a session, which holds all processes of a run."""
    alive = [int(entry.name) for entry in Path("/proc").iterdir() if is_alive(entry)]
    return [pid for pid in alive if session_of(pid) == session]


def session_of(pid: int) -> int | None:
    """Return the session of a process; None if the process is gone."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def only_run(place: Path) -> Path | None:
    """Return the folder of the only run in an output_dir; None if the run did not get that far."""
    found = [path.parent for path in place.glob("*/run.json")] if place.exists() else []
    assert len(found) <= 1, f"one run became {len(found)}"
    return found[0] if found else None


def is_finished(run: Path | None) -> bool:
    return run is not None and json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def outcome(run: Path | None) -> dict[str, Any]:
    """Return everything that must be equal to the bit."""
    assert run is not None
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    files = {
        name: (run / name).read_text(encoding="utf-8")
        for name in ("metrics.csv", "samples.txt")
        if (run / name).exists()
    }
    left = [path.name for path in (run / "checkpoints").iterdir() if path.suffix in (".tmp", ".broken")]
    return {**{key: record[key] for key in ("status", "metrics", "weights_sha256")}, **files, "left behind": left}


def run_overrides(model: str, workers: int, processes: int) -> tuple[str, ...]:
    return (*SHORT, *MODELS[model], f"data.num_workers={workers}", *ddp_overrides(processes))


def ddp_overrides(processes: int) -> list[str]:
    return ["trainer=ddp_cpu", f"trainer.devices={processes}"] if processes > 1 else []


def kill_ablation(options: argparse.Namespace) -> int:
    """Kill an ablation repeatedly, and print the outcome."""
    different = 0
    for processes in options.processes:
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            harness = Harness(Path(folder), seed=options.seed)
            words = [f"ablation={options.ablation[0]}", *options.ablation[1:]]
            number, differ = harness.ablation(words, options.kills, processes)
        different += len(differ)
        print(f"{processes} at once, {options.kills} kills: {number - len(differ)} of {number} runs equal to the bit")
        print(*(f"  DIFFERENT: {name}" for name in differ), sep="\n" if differ else "", end="")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="number of kills over all combinations (default: 100)")
    parser.add_argument("--signals", type=int, default=0, help="number of each signal (default: 0)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2, 4), default=[1, 2])
    parser.add_argument(
        "--ranks", type=int, default=0, help="number of single-process failures of each kind (default: 0)"
    )
    parser.add_argument("--restarts", type=int, default=0, help="failures that a run ends by itself (default: 0)")
    parser.add_argument("--times", type=int, default=4, help="disturbances per run (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the disturbances")
    parser.add_argument("--ablation", nargs="+", metavar="WORD", help="name of an ablation, and overrides")
    options = parser.parse_args()
    if options.ablation:
        return kill_ablation(options)

    combinations = list(product(options.models, options.workers, options.processes))
    wanted = [("kill", options.kills), *((name, options.signals) for name in SIGNALS)]
    wanted += [*((how, options.ranks) for how in FAILURES), (RESTARTED, options.restarts)]
    tally, different, number = Counter[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        harness = Harness(Path(folder), seed=options.seed)
        for what, left in wanted:
            while left > 0:
                model, workers, processes = combinations[number % len(combinations)]
                fails = what in FAILURES
                if what == "kill":
                    disturb = harness.kill
                elif what == RESTARTED:
                    disturb = harness.restarted(processes)
                else:
                    disturb = harness.fail(what, processes) if fails else harness.signal(what)
                times = 1 if fails or what == RESTARTED else min(left, options.times)
                overrides = run_overrides(model, workers, processes)
                harness.reference(overrides)
                differs, done = harness.disturbed(overrides, f"run{number}", disturb, times)
                left, number = left - len(done), number + 1
                tally.update(f"{what}: {event}" for event in done)
                different += bool(differs)
                verdict = f"DIFFERENT: {differs}" if differs else "equal"
                print(
                    f"{model}, {workers} workers, {processes} processes; {what}: {', '.join(done)}; {verdict}",
                    flush=True,
                )
    print(*(f"{count:4} {event}" for event, count in sorted(tally.items())), sep="\n")
    print(f"{tally.total()} disturbances in {number} runs: {number - different} of {number} runs equal to the bit")
    return 1 if different else 0


if (fault := os.environ.get(FAULT)) and __name__ in ("__main__", "__mp_main__"):  # the second in a run's workers
    event_to_die_in, _, times_to_pass = fault.rpartition(":")
    kill_self_at(event_to_die_in, int(times_to_pass))

if __name__ == "__main__":
    if fault:
        sys.argv[0] = __file__
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        sys.exit(main())
