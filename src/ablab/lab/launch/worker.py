"""DDP worker entry point: one process of a run that `ablab.lab.launch.torchrun` has started."""

from __future__ import annotations

import io
import json
import multiprocessing as mp
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ablab.errors import CRASHED, ConfigError, Diverged, RunError, RunInUse, Stopped
from ablab.lab.launch.processes import is_lost_connection, lost_connection
from ablab.lab.run import signals
from ablab.rank import SINGLE_PROCESS_VALUES
from ablab.screen import print_utf8, tolerate_broken_streams

# Ends that all workers come to, each by its error; the more special ones first.
ERRORS: dict[str, type[Exception]] = {"taken": RunInUse, "refused": ConfigError, "diverged": Diverged}
PATIENCE = 5.0  # seconds after a lost connection in which the agent may find the worker that was lost
# Variables that the agent sets for each worker.
AGENT_VARIABLES = {
    *SINGLE_PROCESS_VALUES,
    *("MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE"),
}


@dataclass
class Job:
    """A run and the surroundings of the process that has started it."""

    train: Callable[..., Any]  # ablab.lab.train.train
    config: dict[str, Any]
    hydra: DictConfig | None
    folder: Path  # temporary, shared by the workers: failures, and the folder of the run
    environment: dict[str, str]
    path: list[str]
    num_threads: int
    stdout: int
    stderr: int

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stdout": DupFd(self.stdout), "stderr": DupFd(self.stderr)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, stdout=state["stdout"].detach(), stderr=state["stderr"].detach())

    @property
    def run_file(self) -> Path:
        """The file with the run's folder, by which restarted workers find the run."""
        return self.folder / "run"

    def note_run(self, folder: Path) -> None:
        self.run_file.write_text(str(folder), encoding="utf-8")


@dataclass
class Ended:
    """The end of a run that all workers have agreed on."""

    kind: str  # "finished", "stopped", or a key of `ERRORS`
    text: str = ""
    folder: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


@dataclass
class Failure:
    """The error that ended one worker."""

    kind: str  # "failed", or a key of `ERRORS`
    rank: int
    text: str
    exit_code: int
    traceback: str  # "" where the text says all
    is_lost_connection: bool  # to a worker that has failed before
    time: float

    def write(self, folder: Path) -> None:
        temporary = folder / f".failure-{self.rank}"
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        temporary.rename(folder / f"failure-{self.rank}.json")

    @staticmethod
    def read_all(folder: Path) -> list[Failure]:
        """Return the failures of all workers in their order, those that only lost a connection last."""
        found = [Failure(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("failure-*.json")]
        return sorted(found, key=lambda failure: (failure.is_lost_connection, failure.time))


def work(job: Job) -> Ended:
    """Train in this process, as one of several.

    Returns:
        The end of the run, where all workers come to the same one; the agent gets it.

    Raises:
        SystemExit: this worker failed; the reason is in the job's folder.
    """
    signals.install()
    signals.defer()  # it belongs to a run from its first moment
    os.setpgrp()  # a terminal's Ctrl-C reaches the agent alone, which forwards it
    threading.Thread(target=leave_with_the_agent, daemon=True).start()
    take_over(job)
    rank = int(os.environ["RANK"])
    cfg = OmegaConf.create(job.config)
    if job.run_file.exists():
        cfg.resume = job.run_file.read_text(encoding="utf-8")
        if rank == 0:
            restarts, allowed = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["TORCHELASTIC_MAX_RESTARTS"]
            print(f"a worker failed; all are restarted ({restarts} of at most {allowed} times)", flush=True)
    try:
        run = job.train(cfg, on_open=job.note_run if rank == 0 else None)
        ended = Ended("finished", "", str(run.folder), run.metrics, run.weights)
    except Stopped as stopped:
        ended = Ended("stopped", str(stopped))
    except (ConfigError, Diverged) as error:  # nearly always of all workers, which then all return it
        kind = next(kind for kind, of_kind in ERRORS.items() if isinstance(error, of_kind))
        Failure(kind, rank, str(error), CRASHED, "", False, time.time()).write(job.folder)
        signals.stop_deferring()
        return Ended(kind, str(error))
    except Exception as error:
        lost, known = is_lost_connection(error), isinstance(error, RunError)
        text = lost_connection(error) if lost else str(error) if known else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, RunError) else CRASHED
        trace = "" if known or lost else "".join(traceback.format_exception(error))
        Failure("failed", rank, text, code, trace, lost, time.time()).write(job.folder)
        signals.stop_deferring()  # the agent's SIGTERM ends this process
        if lost and signals.requested is None:
            time.sleep(PATIENCE)
        sys.exit(code)
    signals.ignore_all()  # others may still be saving: a signal must not turn a run that is complete into a failed one
    return ended


def take_over(job: Job) -> None:
    """Take over the surroundings of the process that has started the run."""
    of_agent = [name for name in os.environ if name in AGENT_VARIABLES or name.startswith("TORCHELASTIC")]
    own = {name: os.environ[name] for name in of_agent}
    os.environ.clear()
    os.environ.update(job.environment | own)
    sys.path[:] = job.path
    mp.set_start_method(None, force=True)  # data loaders start their workers as in any run, not by a fork server
    if job.hydra is not None:
        HydraConfig.instance().set_config(job.hydra)
    local_rank, num_workers = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    os.dup2(job.stdout if local_rank == 0 else os.open(os.devnull, os.O_WRONLY), 1)  # the first one prints for all
    os.dup2(job.stderr, 2)
    tolerate_broken_streams()
    print_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, job.num_threads // num_workers))


def leave_with_the_agent() -> None:
    """End this process when the one that has started the run is gone."""
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(CRASHED)
