"""Start the processes of a run on this machine through torch.distributed.elastic, the engine of torchrun.

Its agent watches the workers, ends all of them when one fails, and restarts them as often as `trainer.max_restarts`
allows. Each worker calls `ablab.lab.launch.worker.work`, which trains as under `torchrun train.py ...`. The command
`torchrun` itself would compose the config once in each process, which neither a sweep nor a notebook survives.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from ablab.disk import write_text
from ablab.errors import ConfigError, Diverged, RunError, Stopped
from ablab.lab.launch.fork_server import start_fork_server
from ablab.lab.launch.processes import LOOPBACK, Failed
from ablab.lab.launch.worker import ERRORS, Ended, Failure, Job, work
from ablab.lab.run import signals
from ablab.lab.run.folder import read_record, timestamp
from ablab.lab.run.identity import plain
from ablab.lab.run.redaction import redact
from ablab.rank import OWN_RUN_ID

START_METHOD = "ABLAB_START_METHOD"  # a variable of the tests, whose programs fork from a process that is loaded


def launch(train: Callable[..., Any], cfg: DictConfig, num_workers: int, max_restarts: int) -> Ended:
    """Train a run in several processes on this machine.

    Args:
        train: called in each process with the config.
        cfg: the composed config.
        num_workers: processes to start, one for each device.
        max_restarts: times that all workers are restarted after one has failed, from the newest checkpoint.

    Returns:
        The end of the run, as its first worker has reported it.

    Raises:
        ConfigError: the config is invalid; nothing has been written.
        RunError: training failed in one of the workers; the run can be resumed.
        Stopped: the run was asked to stop, and can be resumed.
    """
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported below, once
    start_method = os.environ.get(START_METHOD, "forkserver")
    if start_method == "forkserver":
        start_fork_server()
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder:
        job = Job(
            train=train,
            config=plain(cfg),
            hydra=OmegaConf.create({"hydra": HydraConfig.get()}) if HydraConfig.initialized() else None,
            folder=Path(folder),
            environment=dict(os.environ),
            path=[*sys.path],
            num_threads=torch.get_num_threads(),
            stdout=descriptor(sys.stdout, 1),
            stderr=descriptor(sys.stderr, 2),
        )
        with Rendezvous(job) as rendezvous, stoppable():
            spec = WorkerSpec(
                role="ablab",
                local_world_size=num_workers,
                rdzv_handler=rendezvous,
                entrypoint=work,
                args=(job,),
                max_restarts=max_restarts,
                local_addr=LOOPBACK,
            )
            agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=folder), start_method=start_method)
            rendezvous.agent = agent
            try:
                return end_of(agent.run(), job)
            except Diverged:
                raise  # recorded by the workers, which have all met it
            except (RuntimeError, OSError) as failure:
                record_failure(job, failure)
                raise


def end_of(result: RunResult, job: Job) -> Ended:
    """Return how the run ended, or raise the error that ended it.

    Raises:
        ConfigError, RunError, Stopped: see `launch`.
    """
    if not result.is_failed():
        ended: Ended = result.return_values[0]
        if ended.kind == "stopped":
            raise Stopped(ended.text)
        if ended.kind in ERRORS:
            raise ERRORS[ended.kind](ended.text)
        return ended
    failures = Failure.read_all(job.folder)
    if failures and not failures[0].is_lost_connection:
        first = failures[0]
        if first.kind in ERRORS:
            raise ERRORS[first.kind](first.text)
        print(first.traceback, end="", file=sys.stderr)
        raise Failed(f"process {first.rank} of this run: {first.text}", first.exit_code)
    if signals.requested is not None:  # the request ended the workers while they could not save yet
        raise Stopped(signals.requested.name)
    for rank, ended_by in result.failures.items():
        if ended_by.exitcode < 0:
            name = signal.Signals(-ended_by.exitcode).name
            raise Failed(f"process {rank} of this run was ended by {name}; the run can be resumed")
    if failures:
        raise Failed(failures[0].text)
    [(rank, ended_by), *_] = result.failures.items()
    raise Failed(f"process {rank} of this run ended with exit code {ended_by.exitcode}; the run can be resumed")


def record_failure(job: Job, failure: Exception) -> None:
    """Record the error that ended a run in its run.json, which has at best that a connection was lost."""
    if not job.run_file.exists():
        return
    folder = Path(job.run_file.read_text(encoding="utf-8"))
    with contextlib.suppress(ConfigError, RunError, OSError):  # the folder is gone, or the disk is full
        record = read_record(folder) | {"status": "failed", "error": redact(str(failure))}
        record.setdefault("ended", timestamp())
        write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")


def descriptor(stream: TextIO, standard: int) -> int:
    """Return the descriptor of an output stream, which is a log file's in a sweep.

    Args:
        stream: `sys.stdout` or `sys.stderr`.
        standard: the descriptor of a stream that is no file, as in a notebook.
    """
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
        if isinstance(stream, io.TextIOWrapper):
            return stream.fileno()
    return standard


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Leave signals to `Rendezvous.num_nodes_waiting`: the agent's own handlers would end the workers at once."""
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before, handler = os.environ.get(name), signal.getsignal(signal.SIGQUIT)
    os.environ[name] = "SIGQUIT"
    signals.defer()
    signals.restore()
    try:
        yield
    finally:
        signals.stop_deferring()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGQUIT, handler)
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class Rendezvous(RendezvousHandler):
    """The rendezvous of one machine: a store that only this machine can reach.

    torch's own handlers listen on every network interface. The agent calls this one before each start of the workers,
    and while it watches them.
    """

    agent: LocalElasticAgent

    def __init__(self, job: Job) -> None:
        self.job = job
        self.asked_to_stop: set[int] = set()  # process ids
        self.store: TCPStore | None = None

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_process_groups()
        self.store = None

    def pids(self) -> list[int]:
        """Return the process ids of the workers that have been started."""
        return [worker.id for worker in self.agent.get_worker_group().workers if isinstance(worker.id, int)]

    def end_process_groups(self) -> None:
        """End what workers have left behind: each leads a group, with the workers of its data loaders."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def next_rendezvous(self) -> RendezvousInfo:
        """Prepare the next start of all workers.

        Raises:
            Stopped: the run was asked to stop.
        """
        if signals.requested is not None:
            raise Stopped(signals.requested.name)
        self.end_process_groups()  # they would keep the lock of the run
        failures = Failure.read_all(self.job.folder)
        if failures:
            first = failures[0]
            print(f"{first.traceback}process {first.rank} of this run: {first.text}", file=sys.stderr)
        for file in self.job.folder.glob("failure-*.json"):
            file.unlink()
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        # a new one for each start: in an old one, workers would find the addresses of those before
        self.store = TCPStore(LOOPBACK, port, is_master=True, master_listen_fd=listener.detach())
        return RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def num_nodes_waiting(self) -> int:
        """Forward a request to stop, since the agent asks ten times a second; no other node ever waits."""
        if signals.requested is not None:
            # a second SIGINT would end a worker at once, and a terminal's Ctrl-C sends one
            interrupted = signals.requested == signal.SIGINT
            for pid in {*self.pids()} - self.asked_to_stop:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if interrupted else signals.requested)
                self.asked_to_stop.add(pid)
        return 0

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: the store ends with the run."""

    def get_run_id(self) -> str:
        return OWN_RUN_ID

    def shutdown(self) -> bool:
        return True
