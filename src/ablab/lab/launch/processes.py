"""The processes of one run: started together, agreed before anything trains, and ended together.

Lightning would start the command line again in each, which a sweep or a notebook does not survive. Here the other
processes get the config itself (`ablab.lab.launch.worker`). Under torchrun and srun, which start all processes, nothing
is started; the processes then compare their composed configs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from omegaconf import DictConfig, OmegaConf

from ablab.errors import CRASHED, ConfigError, RunError, Stopped
from ablab.lab.launch.requeue import requeue
from ablab.lab.run import signals
from ablab.lab.run.identity import flat, plain
from ablab.rank import REPORTS, launcher

STARTING = timedelta(minutes=5)  # that processes have to load what they need
GRACE = 5.0  # seconds that the others have to end by themselves once one has failed
LONGEST_END = 60.0  # seconds that this process has to write how the run ended
FAILURE = "ablab/failure"  # where processes that torchrun or srun has started leave word of how they failed
OWN_WORDS = ("resume", "folder")  # keys of the config that the first process decides alone
LOOPBACK = "127.0.0.1"


class Failed(RunError):
    """Another process of the run has failed."""

    def __init__(self, message: str, exit_code: int = CRASHED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Members(_Launcher):
    """The other processes of a run on this machine, in the place of Lightning's launcher.

    Args:
        trainer: that of the run.
        cfg: its config, which they get.
    """

    is_interactive_compatible = True

    def __init__(self, trainer: L.Trainer, cfg: DictConfig) -> None:
        self.environment: Any = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        self.listener: socket.socket | None = None
        self.num_here = int(trainer.strategy.num_processes)  # type: ignore[attr-defined]
        self.world_size = trainer.world_size
        self.config = plain(cfg)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failure: Failed | None = None
        self.failed = threading.Event()
        self.ending = False
        self.aborting = threading.Lock()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Call a function in this process, once the others have been started."""
        if not self.environment.creates_processes_externally:
            self.listener = socket.create_server((LOOPBACK, 0))
            self.start()
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """Send a signal to the others, and to the workers of each."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)

    def start(self) -> None:
        """Start the others, each with its rank in the environment and the config on its standard input."""
        assert self.listener is not None
        _set_num_threads_if_needed(num_processes=self.num_here)
        os.environ |= {
            "MASTER_ADDR": LOOPBACK,  # whatever an earlier job has left there
            "MASTER_PORT": str(self.listener.getsockname()[1]),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.world_size),
        }
        told = json.dumps({"config": self.config, "path": [str(Path(entry).absolute()) for entry in sys.path]})
        for rank in range(1, self.num_here):
            reports, theirs = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-m", "ablab.lab.launch.worker"],
                stdin=subprocess.PIPE,
                env={**os.environ, "LOCAL_RANK": str(rank), REPORTS: str(theirs)},
                pass_fds=[theirs],
                process_group=0,  # its workers belong to it, and are ended with it
            )
            os.close(theirs)
            self.processes.append(process)
            threading.Thread(target=self.watch, args=(rank, process, reports), daemon=True).start()
            assert process.stdin is not None
            process.stdin.write(told.encode() + b"\n")
            process.stdin.flush()

    def watch(self, rank: int, process: subprocess.Popen[bytes], reports: int) -> None:
        """Wait for a process to end; if it failed, the run fails."""
        with open(reports, "rb") as pipe:
            line = pipe.readline()  # empty where it ends without a word
        if not line and process.wait() == 0:
            return
        if self.failure is None and not self.ending:
            self.failure = described(rank, line, process)
        self.failed.set()
        if self.ending:
            return
        time.sleep(GRACE)  # this process meets the loss itself, at the next thing that all do together
        if self.ending:  # the next run of a sweep may have begun
            return
        self.kill(signal.SIGKILL)
        self.abort()  # frees a main thread that waits on a GPU
        time.sleep(LONGEST_END)
        if not self.ending:
            print(f"error: {self.failure}; process 0 hangs and is ended too", file=sys.stderr, flush=True)
            os._exit(CRASHED)

    def abort(self) -> None:
        """Leave NCCL's group without the others; gloo's knows by itself that one is gone."""
        with self.aborting:
            if dist.is_initialized() and dist.get_backend() == "nccl":
                dist.distributed_c10d._abort_process_group()

    def end(self, *, well: bool) -> None:
        """Wait for the others to end as this one has, or end them; forget what they had in common."""
        self.ending = True
        deadline = time.monotonic() + (LONGEST_END if well else 0)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill(signal.SIGKILL)
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()


@contextlib.contextmanager
def together(trainer: L.Trainer, cfg: DictConfig) -> Iterator[Members | None]:
    """Bring the processes of a run together; when this one leaves, well or not, so do the others.

    Args:
        trainer: that of the run.
        cfg: its config; `resume` becomes what the first process has.

    Raises:
        ConfigError: the processes have composed different configs, or there can be none from here.
        Failed: another process has failed, or does not answer.
    """
    if not isinstance(trainer.strategy, ParallelStrategy):
        try:
            yield None
        except Stopped:
            go_on_later(cfg)
            raise
        return
    check_possible(cfg, trainer)
    strategy: Any = trainer.strategy
    members = Members(trainer, cfg)
    strategy._launcher = members
    # Lightning's way to tell all processes of a signal, an exchange in each step; ours is `ablab.tasks.exchange`
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    environment, threads = dict(os.environ), torch.get_num_threads()
    well = False
    try:
        with first_failure(members), signals.default_handlers():
            if trainer.num_nodes == 1:
                stay_on_loopback()
            members.launch(lambda: joined(trainer, members.listener))
            agree(cfg, trainer)
        yield members
        well = True
    except Stopped:
        well = True
        go_on_later(cfg)
        if launcher() is not None:  # which may end the others as soon as one leaves, before they have closed
            dist.barrier()
        raise
    finally:
        members.end(well=well)
        if not well:
            members.abort()
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)


def check_possible(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Refuse processes that cannot be brought together from here.

    Raises:
        ConfigError: with the remedy.
    """
    if trainer.num_nodes > 1 and launcher() is None:
        raise ConfigError(
            f"trainer.num_nodes={trainer.num_nodes}: a run starts the processes of its own machine alone; torchrun or "
            "srun start those of several machines, see docs/cluster.md"
        )
    if dist.is_initialized():
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices}: this Python process is in a process group already, whose size "
            "would be taken for the run's; end it first with torch.distributed.destroy_process_group()"
        )
    strategy = cfg.trainer.strategy
    compression = strategy.get("compression") if isinstance(strategy, DictConfig) else None
    if compression is not None and trainer.strategy.root_device.type != "cuda":
        raise ConfigError(
            f"trainer.strategy.compression={compression}: it is for GPUs, and this run is on "
            f"{trainer.strategy.root_device.type}; leave it out"
        )


@contextlib.contextmanager
def first_failure(members: Members | None) -> Iterator[None]:
    """Let an error that is only the loss of another process be the one that this process had."""
    try:
        yield
    except Exception as error:
        if members is None:
            raise
        if not of_the_connection(error):
            tell(error)
        raise blamed(error, members) from error


@contextlib.contextmanager
def lost_worker() -> Iterator[None]:
    """Let the end of a data loader's worker be one message: torch raises it wherever the training is just then.

    Raises:
        RunError: a worker was killed, or cannot be started.
    """
    try:
        yield
    except RuntimeError as error:
        if str(error).startswith("DataLoader workers cannot be started"):  # see ablab.data.loader
            raise RunError(str(error)) from error
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise RunError(
            f"{str(error.__cause__ or error).strip().rstrip('.')}: a worker that reads data has ended, mostly because "
            "memory ran out; use fewer data.num_workers, or a smaller data.batch_size, then resume the run"
        ) from error


def joined(trainer: L.Trainer, listener: socket.socket | None) -> None:
    """Join the other processes; loading what they need takes longer than a step may.

    Args:
        trainer: that of the run.
        listener: the first process's socket, to which its own processes connect.
    """
    strategy: Any = trainer.strategy
    timeout, strategy._timeout = strategy._timeout, max(strategy._timeout, STARTING)
    if trainer.num_nodes == 1 and launcher() != "torchrun":  # whose agent brings its processes together itself
        device = strategy.root_device
        strategy.accelerator.setup_device(device)
        dist.init_process_group(
            strategy.process_group_backend or dist.get_default_backend_for_device(device),
            store=local_store(trainer, listener, strategy._timeout),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            timeout=strategy._timeout,
            device_id=None if device.type == "cpu" else device,
        )
    strategy.setup_environment()
    assert dist.get_world_size() == strategy.num_nodes * strategy.num_processes
    strategy._timeout = timeout
    dist.distributed_c10d._set_pg_timeout(timeout)


def local_store(trainer: L.Trainer, listener: socket.socket | None, timeout: timedelta) -> dist.TCPStore:
    """Return a store that only this machine can reach; torch's own listens on every network, and asks nobody's name.

    Raises:
        RunError: another program has the port that srun's processes agree on.
    """
    port = trainer.strategy.cluster_environment.main_port if listener is None else listener.getsockname()[1]  # type: ignore[attr-defined]
    first = trainer.global_rank == 0
    if first and listener is None:
        try:
            listener = socket.create_server((LOOPBACK, port))
        except OSError as error:
            raise RunError(f"MASTER_PORT={port}: {error.strerror}; set MASTER_PORT to a port that is free") from error
    return dist.TCPStore(
        LOOPBACK,
        port,
        trainer.world_size,
        first,
        timeout=timeout,
        master_listen_fd=listener.detach() if listener is not None else None,
    )


def stay_on_loopback() -> None:
    """Have gloo's processes on one machine connect over its loopback interface, unless the user has chosen another."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]  # lo, on macOS lo0
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def go_on_later(cfg: DictConfig) -> None:
    """Have Slurm start a stopped job again, if its command will find the run."""
    if (cfg.folder is not None or cfg.resume is not None) and requeue():
        print("the job is back in the queue and will go on with this run", flush=True)


def agree(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Compare the configs of all processes, and take the first one's word on what is resumed.

    Raises:
        ConfigError: they differ.
    """
    here = flat(plain(cfg))
    own = {key: here.pop(key) for key in OWN_WORDS}
    if not same_everywhere(repr(sorted(here.items())), trainer.strategy.root_device):
        everywhere: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(everywhere, here)
        rank, there = next((rank, there) for rank, there in enumerate(everywhere) if repr(there) != repr(everywhere[0]))
        keys = sorted(everywhere[0].keys() | there.keys())
        both = [(key, everywhere[0].get(key, "(none)"), there.get(key, "(none)")) for key in keys]
        lines = [f"  {key}: {a} in process 0, {b} in process {rank}" for key, a, b in both if repr(a) != repr(b)]
        raise ConfigError(
            "\n".join(["the processes of this run have composed different configs:", *lines])
            + "\n  give all of them the same command; a value that is drawn is drawn before, by a sweep"
        )
    for key, value in shared(own, trainer.world_size).items():
        OmegaConf.update(cfg, key, value)


def same_everywhere(text: str, device: torch.device) -> bool:
    """Whether all processes have the same text; what they exchange is as short however many they are."""
    mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)
    largest = torch.tensor([mine, ~mine], device=device)  # the largest ~h is that of the smallest h
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    high, low = largest.tolist()
    return high == ~low


def shared(value: Any, world_size: int) -> Any:
    """What the first process has, in all of them."""
    if world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def blamed(error: Exception, members: Members) -> Exception:
    """The error that a run ends with: the first one, wherever it was."""
    if not of_the_connection(error):
        if isinstance(error, RunError | ConfigError):  # all processes meet it
            return error
        return members.failure or error
    if launcher() is not None:
        members.failure = told()
    else:
        members.failed.wait(2 * GRACE)  # of which process is the connection lost?
    if members.failure is not None:
        return members.failure
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return Failed(f"another process of this run has ended, or did not answer within trainer.strategy.timeout ({first})")


def tell(error: Exception) -> None:
    """Leave word of this process's failure for the others, where torchrun or srun has started them."""
    if launcher() is not None and dist.is_initialized():
        text = f"process {dist.get_rank()} of this run: {type(error).__name__}: {error}"
        with contextlib.suppress(dist.DistError):
            dist.distributed_c10d._get_default_store().set(FAILURE, text)


def told() -> Failed | None:
    """The failure of another process that has left word of it."""
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(dist.DistError):  # the first process keeps the words, and may be the one that is gone
        while time.monotonic() < deadline:
            if store.check([FAILURE]):
                return Failed(store.get(FAILURE).decode())
            time.sleep(0.1)
    return None


def of_the_connection(error: BaseException) -> bool:
    """Whether an error only says that another process is gone or silent."""
    if "EADDRINUSE" in str(error):  # of a port here, taken by another program
        return False
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    words = ("gloo/transport", "Gloo connect", "Connection closed by peer", "Connection reset by peer", "pair closure")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def described(rank: int, line: bytes, process: subprocess.Popen[bytes]) -> Failed:
    """How another process has failed, after its traceback has been printed."""
    if not line:
        code = process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Failed(f"process {rank} of this run {how}; the run can be resumed")
    facts = json.loads(line)
    if not facts["known"]:
        print(facts["traceback"], end="", file=sys.stderr)
    return Failed(f"process {rank} of this run: {facts['type']}: {facts['text']}", facts["code"])
