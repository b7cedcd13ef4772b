"""The process group of a run: its processes join, agree on the config, and leave together."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy
from omegaconf import DictConfig, OmegaConf

from ablab.errors import CRASHED, ConfigError, RunError, Stopped
from ablab.lab.launch.requeue import requeue
from ablab.lab.run import signals
from ablab.lab.run.identity import flat, plain
from ablab.rank import is_own_launch, launcher

STARTUP_TIMEOUT = timedelta(minutes=5)  # for the processes to load the libraries
REPORT_TIMEOUT = 5.0  # seconds to wait for the report of a process that has failed
FAILURE_KEY = "ablab/failure"  # in the store: the failure of a process that torchrun or srun has started
RANK_ZERO_KEYS = ("resume", "folder")  # keys of the config that the first process decides alone
LOOPBACK = "127.0.0.1"


class Failed(RunError):
    """Another process of the run has failed."""

    def __init__(self, message: str, exit_code: int = CRASHED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def process_group(trainer: L.Trainer, cfg: DictConfig) -> Iterator[None]:
    """Join the other processes of the run, whoever has started them, and leave the group at the end.

    Args:
        trainer: of the run.
        cfg: its config; `resume` becomes the first process's.

    Raises:
        ConfigError: the processes have composed different configs.
        Failed: another process has failed, or does not answer.
    """
    if not isinstance(trainer.strategy, ParallelStrategy):
        try:
            yield
        except Stopped:
            requeue_job(cfg)
            raise
        return
    # Lightning's way to tell all processes of a signal, an exchange in each step; ours is `ablab.tasks.all_reduce`
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    environment = dict(os.environ)
    ends_well = False
    try:
        with first_failure(), signals.default_handlers():
            if trainer.num_nodes == 1:
                stay_on_loopback()
            join(trainer)
            check_same_config(cfg, trainer)
        yield
        ends_well = True
    except Stopped:
        ends_well = True
        requeue_job(cfg)
        dist.barrier()  # the others are ended as soon as one leaves, before they have closed
        raise
    finally:
        if not ends_well and dist.is_initialized() and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()  # a group of NCCL cannot be left while others are in it
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


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
def first_failure() -> Iterator[None]:
    """Replace an error that only says that another process is gone by the error of that process.

    Of workers that this project has started, `ablab.lab.launch.torchrun` finds it.
    """
    try:
        yield
    except Exception as error:
        if launcher() is None or is_own_launch():
            raise
        if is_lost_connection(error):
            raise failure_of_another(error) from error
        report_failure(error)
        raise


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


def join(trainer: L.Trainer) -> None:
    """Join the other processes; loading the libraries takes longer than a step may."""
    strategy: Any = trainer.strategy
    timeout, strategy._timeout = strategy._timeout, max(strategy._timeout, STARTUP_TIMEOUT)
    if trainer.num_nodes == 1 and launcher() != "torchrun":  # whose agent has a store for its workers
        device = strategy.root_device
        strategy.accelerator.setup_device(device)
        dist.init_process_group(
            strategy.process_group_backend or dist.get_default_backend_for_device(device),
            store=local_store(trainer, strategy._timeout),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            timeout=strategy._timeout,
            device_id=None if device.type == "cpu" else device,
        )
    strategy.setup_environment()
    assert dist.get_world_size() == strategy.num_nodes * strategy.num_processes
    strategy._timeout = timeout
    dist.distributed_c10d._set_pg_timeout(timeout)


def local_store(trainer: L.Trainer, timeout: timedelta) -> dist.TCPStore:
    """Return a store that only this machine can reach; torch's own listens on every network, and asks nobody's name.

    Raises:
        RunError: another program has the port that srun's processes agree on.
    """
    port: int = trainer.strategy.cluster_environment.main_port  # type: ignore[attr-defined]
    listener = None
    if trainer.global_rank == 0:
        try:
            listener = socket.create_server((LOOPBACK, port))
        except OSError as error:
            raise RunError(f"MASTER_PORT={port}: {error.strerror}; set MASTER_PORT to a port that is free") from error
    return dist.TCPStore(
        LOOPBACK,
        port,
        trainer.world_size,
        trainer.global_rank == 0,
        timeout=timeout,
        master_listen_fd=listener.detach() if listener is not None else None,
    )


def stay_on_loopback() -> None:
    """Have gloo's processes on one machine connect over its loopback interface, unless the user has chosen another."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]  # lo, on macOS lo0
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def requeue_job(cfg: DictConfig) -> None:
    """Have Slurm start a stopped job again, if its command will find the run."""
    if cfg.folder is not None or cfg.resume is not None:
        requeue()


def check_same_config(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Compare the configs of all processes, and take the first one's word on what is resumed.

    Raises:
        ConfigError: they differ.
    """
    here = flat(plain(cfg))
    own = {key: here.pop(key) for key in RANK_ZERO_KEYS}
    if not is_same_everywhere(repr(sorted(here.items())), trainer.strategy.root_device):
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
    for key, value in broadcast(own, trainer.world_size).items():
        OmegaConf.update(cfg, key, value)


def is_same_everywhere(text: str, device: torch.device) -> bool:
    """Return whether all processes have the same text, by an all-reduce of its hash."""
    mine = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)
    largest = torch.tensor([mine, ~mine], device=device)  # the largest ~h is that of the smallest h
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    high, low = largest.tolist()
    return high == ~low


def broadcast(value: Any, world_size: int) -> Any:
    """Broadcast a value of rank 0 to all processes."""
    if world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def failure_of_another(error: Exception) -> Failed:
    """Return the failure of the process to which the connection is lost."""
    if (found := reported_failure()) is not None:
        return found
    return Failed(lost_connection(error))


def lost_connection(error: Exception) -> str:
    """Return the message for a lost connection whose cause is not known."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return f"another process of this run has ended, or did not answer within trainer.strategy.timeout ({first})"


def report_failure(error: Exception) -> None:
    """Leave word of this process's failure for the others, where torchrun or srun has started them."""
    if dist.is_initialized():
        text = f"process {dist.get_rank()} of this run: {type(error).__name__}: {error}"
        with contextlib.suppress(dist.DistError):
            dist.distributed_c10d._get_default_store().set(FAILURE_KEY, text)


def reported_failure() -> Failed | None:
    """The failure of another process that has left word of it."""
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + REPORT_TIMEOUT
    with contextlib.suppress(dist.DistError):  # the first process keeps the words, and may be the one that is gone
        while time.monotonic() < deadline:
            if store.check([FAILURE_KEY]):
                return Failed(store.get(FAILURE_KEY).decode())
            time.sleep(0.1)
    return None


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone or silent."""
    if "EADDRINUSE" in str(error):  # of a port here, taken by another program
        return False
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    words = ("gloo/transport", "Gloo connect", "Connection closed by peer", "Connection reset by peer", "pair closure")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
