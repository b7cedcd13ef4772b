"""Launch the runs of an ablation as a Slurm job array.

An array consists of two files in the ablation's folder: its script, `slurm/NAME.sh`, and the folder and command of each
run, `slurm/NAME.tsv`, which also work by hand; overrides with secrets are passed in the environment instead. Nothing is
pickled, a failed run is a failed job, and `squeue` is the only source of job states. This process only watches: after
it ends, the same command watches on.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablab.errors import ConfigError, Stopped
from ablab.lab.ablation.grid import PreparedRun
from ablab.lab.ablation.progress import Progress
from ablab.lab.config.errors import is_traceback_wanted
from ablab.lab.config.schema import show
from ablab.lab.config.yaml_files import CONF
from ablab.lab.run import signals
from ablab.lab.run.folder import LOG
from ablab.lab.run.redaction import redact

POLL_SECONDS = 2.0  # seconds between two calls of squeue
MAX_ARRAY_SIZE = 1000  # jobs per array, Slurm's default MaxArraySize

Element = tuple[str, int]  # the name of an array and an index in it


@dataclass(frozen=True)
class Site:
    """Job settings of this cluster; see conf/hydra/launcher/slurm.yaml."""

    at_once: int | None = None
    time: str = "04:00:00"
    stop_before: int = 120
    setup: list[str] = field(default_factory=list)
    python: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    """The resources of a run."""

    num_nodes: int
    processes: int  # on each
    gpus: int  # on each

    @classmethod
    def of(cls, run: PreparedRun) -> Resources:
        """Return the resources that the config of a run asks for.

        Raises:
            ConfigError: the config leaves the number of devices to the machine, which Slurm has yet to choose.
        """
        trainer = run.cfg.trainer
        if not str(trainer.devices).isdigit():
            raise ConfigError(
                f"trainer.devices={show(trainer.devices)}: Slurm has to be told how many; give a number "
                f"({run.plan.cell_label})"
            )
        devices = int(trainer.devices)
        return cls(int(trainer.get("num_nodes", 1)), devices, 0 if trainer.accelerator == "cpu" else devices)


def launch(runs: list[PreparedRun], site: Site, progress: Progress) -> None:
    """Submit runs that are neither done nor queued, and watch until all have left the queue.

    Args:
        runs: of the ablation.
        site: the job settings.
        progress: notified when a run starts and ends.

    Raises:
        ConfigError: Slurm refuses the jobs, does not respond, or is not installed.
        Stopped: a signal arrived; the jobs continue.
    """
    missing = [run for run in runs if not run.is_done]
    if not missing:
        return
    if shutil.which("sbatch") is None:
        raise ConfigError("hydra/launcher=slurm: there is no sbatch here; give the command on a machine that has Slurm")
    place = missing[0].folder.parent / "slurm"
    in_queue = {folder: element for element, folder in queued_elements(place).items()}
    watched = {in_queue[run.folder.name]: run for run in missing if run.folder.name in in_queue}
    by_resources: dict[Resources, list[PreparedRun]] = {}
    for run in missing:
        if run.folder.name not in in_queue:
            by_resources.setdefault(Resources.of(run), []).append(run)
    for resources, some in by_resources.items():
        for start in range(0, len(some), MAX_ARRAY_SIZE):
            watched |= submit(some[start : start + MAX_ARRAY_SIZE], resources, site, place)
    names = ", ".join(sorted({name for name, _ in watched}))
    print(f"in Slurm's queue: {len(watched)} runs ({names})", flush=True)
    with progress:
        watch(watched, progress)


def submit(runs: list[PreparedRun], resources: Resources, site: Site, place: Path) -> dict[Element, PreparedRun]:
    """Submit runs as one array."""
    name = f"{place.parent.name}_{secrets.token_hex(4)}"
    place.mkdir(parents=True, exist_ok=True)
    hidden: dict[str, str] = {}
    lines = [f"{run.folder}\t{run_command(run, site, hidden)}\n" for run in runs]
    (place / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    (place / f"{name}.sh").write_text(array_script(name, len(runs), resources, site, place), encoding="utf-8")
    done = subprocess.run(
        ["sbatch", "--parsable", place / f"{name}.sh"],
        env={
            **os.environ,
            **hidden,
            "HYDRA_FULL_ERROR": str(int(is_traceback_wanted())),  # this process has overwritten it for itself
        },
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if done.returncode:
        for suffix in (".tsv", ".sh"):
            (place / (name + suffix)).unlink()
        message = done.stderr.strip().replace("sbatch: error: ", "")
        raise ConfigError(f"hydra.launcher: sbatch refuses the jobs: {message}; hydra.launcher.options are your site's")
    return {(name, index): run for index, run in enumerate(runs)}


def run_command(run: PreparedRun, site: Site, hidden: dict[str, str]) -> str:
    """Return the command line of a run, without the ablation's file, which would start a sweep.

    Args:
        run: the run.
        site: names the Python interpreter.
        hidden: overrides with secrets, by the environment variable that passes them to the jobs; extended in place.
    """
    arguments = [shlex.quote(str(CONF.parent / "train.py")), "hydra.mode=RUN"]
    for word in run.overrides:
        if redact(word) == word:
            arguments.append(quote_on_one_line(word))
            continue
        name = next((name for name, known in hidden.items() if known == word), f"ABLAB_WORD_{len(hidden)}")
        hidden[name] = word
        arguments.append(f'"${{{name}:?has a secret that is not in this file; submit with --export=ALL}}"')
    return f"{site.python or shlex.quote(sys.executable)} {' '.join(arguments)}"


def quote_on_one_line(word: str) -> str:
    """Quote a word for bash on one line: each run is one line of the list of its array."""
    if word.isprintable():
        return shlex.quote(word)
    signs = [
        sign if sign.isprintable() and sign not in "'\\" else "".join(f"\\x{b:02x}" for b in os.fsencode(sign))
        for sign in word
    ]
    return f"$'{''.join(signs)}'"


def array_script(name: str, number: int, resources: Resources, site: Site, place: Path) -> str:
    """Return the script of an array. The output of a run goes to its log.txt, Slurm's messages beside the script."""
    options = {
        "job-name": name,
        "array": f"0-{number - 1}" + (f"%{site.at_once}" if site.at_once else ""),
        "nodes": resources.num_nodes,
        "ntasks-per-node": resources.processes,
        "gpus-per-node": resources.gpus or None,
        "time": site.time,
        "signal": f"USR1@{site.stop_before}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{place}/%x_%a.txt",
        **site.options,
    }
    given = {key: value for key, value in options.items() if value is not None}
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{key}" + (f"={show(value)}" if value != "" else "") for key, value in given.items()),
            "",
            *site.setup,
            "if [[ -v SLURM_CPUS_PER_TASK ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi",
            "export WANDB_MODE=${WANDB_MODE:-offline}  # scripts/sync.py sends it from a machine with internet",
            f'line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(place / name))}.tsv)',
            "folder=${line%%$'\\t'*} command=${line#*$'\\t'}",
            'mkdir -p "$folder"',
            f'eval "exec srun --kill-on-bad-exit=1 $command" >> "$folder/{LOG}" 2>&1',
            "",
        ]
    )


def queued_elements(place: Path) -> dict[Element, str]:
    """Return the elements of earlier arrays that are still queued, each with its run's folder.

    Raises:
        ConfigError: Slurm does not respond.
    """
    arrays = {file.stem: file.read_text(encoding="utf-8").splitlines() for file in place.glob("*.tsv")}
    if (alive := query_queue(arrays) if arrays else {}) is None:
        raise ConfigError("hydra/launcher=slurm: squeue does not answer; what is in the queue would be submitted again")
    return {
        (name, index): Path(line.partition("\t")[0]).name
        for name, lines in arrays.items()
        for index, line in enumerate(lines)
        if (name, index) in alive
    }


def query_queue(names: Iterable[str]) -> dict[Element, str] | None:
    """Return the state of each element in Slurm's queue; None if Slurm does not respond."""
    command = ["squeue", f"--name={','.join(names)}", "--noheader", "--array", "--format=%j\t%K\t%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    if done.returncode:
        return None
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {(name.strip(), int(index)): state for name, index, state in lines if index.strip().isdigit()}


def watch(runs: dict[Element, PreparedRun], progress: Progress) -> None:
    """Follow runs until they have left the queue.

    Raises:
        Stopped: a signal arrived.
    """
    names = sorted({name for name, _ in runs})
    left, begun, gone = dict(runs), set[Element](), set[Element]()
    signals.defer()
    try:
        while left:
            time.sleep(POLL_SECONDS)
            if signals.requested:
                raise Stopped(signals.requested.name)
            if (states := query_queue(names)) is None:
                continue
            for element, run in list(left.items()):
                if element in states:
                    gone.discard(element)
                    if states[element] == "RUNNING" and element not in begun:
                        begun.add(element)
                        progress.run_started(run)
                elif element not in gone:
                    gone.add(element)  # its files may become visible here with a delay
                else:
                    del left[element]
                    progress.run_ended(run, run.status)
    finally:
        signals.stop_deferring()
        if left:
            print(f"the jobs go on: the same command follows them, scancel --name={','.join(names)} ends them")
