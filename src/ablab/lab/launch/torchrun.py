"""Start the processes of a run on this machine through torch.distributed.elastic, the engine of torchrun.

Its agent watches the workers, ends all of them when one fails, and restarts them as often as `trainer.max_restarts`
allows. Each worker calls `ablab.lab.launch.worker.work`, which trains as under `torchrun train.py ...`. The command
`torchrun` itself would compose the config once in each process, which neither a sweep nor a notebook survives.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing as mp
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from ablab.disk import write_text
from ablab.errors import CRASHED, ConfigError, Diverged, RunError, RunInUse, Stopped
from ablab.lab.launch.worker import Ended, Failure, Job, work
from ablab.lab.run import signals
from ablab.lab.run.folder import read_record, timestamp
from ablab.lab.run.identity import plain
from ablab.lab.run.redaction import redact
from ablab.rank import OWN_RUN_ID

LOOPBACK = "127.0.0.1"
SHUTDOWN_TIMEOUT = 10  # seconds that the other workers have to end by themselves once one has failed


class WorkerFailure(RunError):
    """A failure of one of a run's workers."""

    def __init__(self, message: str, exit_code: int = CRASHED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
        ConfigError: something in the config is wrong; nothing has been written.
        RunError: training went wrong in one of the workers; the run can be resumed.
        Stopped: the run was asked to stop, and can be resumed.
    """
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are reported below, once
    # By default, workers are forked from a process that has loaded the libraries and nothing else: no GPU, no threads.
    start_method = mp.get_start_method(allow_none=True) or "forkserver"
    mp.get_context("forkserver").set_forkserver_preload(["ablab.lab.train"])
    with tempfile.TemporaryDirectory(prefix="ablab-") as folder, Rendezvous() as rendezvous:
        hydra = OmegaConf.create({"hydra": HydraConfig.get()}) if HydraConfig.initialized() else None
        job = Job(
            train,
            plain(cfg),
            hydra,
            Path(folder),
            dict(os.environ),
            [*sys.path],
            descriptor(sys.stdout),
            descriptor(sys.stderr),
        )
        spec = WorkerSpec(
            role="ablab",
            local_world_size=num_workers,
            rdzv_handler=rendezvous,
            entrypoint=work,
            args=(job,),
            max_restarts=max_restarts,
            local_addr=LOOPBACK,
        )
        logs = DefaultLogsSpecs(log_dir=folder)
        agent = LocalElasticAgent(spec, logs, start_method=start_method, shutdown_timeout=SHUTDOWN_TIMEOUT)
        with forwarded_signals(agent):
            result = agent.run()
        try:
            return end_of(result, job)
        except WorkerFailure as failure:
            if job.run_file.exists():  # its record has at best that a connection was lost
                record_failure(Path(job.run_file.read_text(encoding="utf-8")), failure)
            raise


def end_of(result: RunResult, job: Job) -> Ended:
    """Return how the run ended, or raise the error that ended it.

    Raises:
        ConfigError, RunError, Stopped: see `launch`.
    """
    if not result.is_failed():
        ended: Ended = result.return_values[0]
        match ended.kind:
            case "stopped":
                raise Stopped(ended.text)
            case "taken":
                raise RunInUse(ended.text)
            case "refused":
                raise ConfigError(ended.text)
            case "diverged":
                raise Diverged(ended.text)
        return ended
    failures = sorted(Failure.read_all(job.folder), key=lambda failure: failure.time)
    if own := [failure for failure in failures if not failure.is_lost_connection]:
        first = own[0]
        if first.traceback:
            print(first.traceback, end="", file=sys.stderr)
        raise WorkerFailure(f"process {first.rank} of this run: {first.text}", first.exit_code)
    for rank, failure in result.failures.items():
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise WorkerFailure(f"process {rank} of this run was ended by {name}; the run can be resumed")
    if failures:
        raise WorkerFailure(failures[0].text)
    [(rank, failure), *_] = result.failures.items()
    raise WorkerFailure(f"process {rank} of this run ended with exit code {failure.exitcode}; the run can be resumed")


def record_failure(folder: Path, failure: WorkerFailure) -> None:
    """Record the failure that ended a run in its run.json."""
    record = read_record(folder) | {"status": "failed", "error": redact(str(failure))}
    record.setdefault("ended", timestamp())
    write_text(folder / "run.json", json.dumps(record, indent=2) + "\n")


def descriptor(stream: TextIO) -> int:
    """Return the descriptor of an output stream; that of a file in a sweep, whose runs each have a log."""
    stream.flush()
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):  # of a notebook or a test
        return 2 if stream is sys.stderr else 1


@contextlib.contextmanager
def forwarded_signals(agent: LocalElasticAgent) -> Iterator[None]:
    """Forward requests to stop to all workers, which save and end; at the end, end whatever they have started."""
    # The agent would put its own handlers in the place of ours, and end the workers at once.
    before = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"

    def send(number: int) -> None:
        for pid in pids(agent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # a terminal's Ctrl-C must not end a worker at its second SIGINT
    forward = signals.forward(lambda number: send(signal.SIGTERM if number == signal.SIGINT else number))
    started: set[int] = set()
    try:
        with forward:
            yield
    finally:
        started |= set(pids(agent))
        for pid in started:  # each leads a group of its own, with its data loader's workers
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        if before is None:
            del os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]
        else:
            os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = before


def pids(agent: LocalElasticAgent) -> list[int]:
    """Return the process ids of the workers that have been started."""
    return [worker.id for worker in agent.get_worker_group().workers if isinstance(worker.id, int)]


class Rendezvous(RendezvousHandler):
    """The rendezvous of one machine: a store that only this machine can reach.

    torch's own handlers listen on every network interface.
    """

    def __enter__(self) -> Rendezvous:
        listener = socket.create_server((LOOPBACK, 0))
        self.port = listener.getsockname()[1]
        self.store = TCPStore(
            LOOPBACK, self.port, is_master=True, master_listen_fd=listener.detach(), wait_for_workers=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        del self.store

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo(LOOPBACK, self.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return OWN_RUN_ID

    def shutdown(self) -> bool:
        return True
