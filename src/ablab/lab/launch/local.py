"""Launch the runs of an ablation on this machine: serially in this process, or several in parallel.

The folders are the queue: finished runs are skipped, runs in use by another process are left to it, and interrupted
runs are resumed. Launches may therefore be repeated, killed, or started several times at once.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ablab.data.reading import read_once
from ablab.errors import ConfigError, Diverged, RunError, RunInUse, Stopped
from ablab.lab.ablation.grid import PreparedRun
from ablab.lab.ablation.progress import Progress
from ablab.lab.launch.fork_server import start_fork_server
from ablab.lab.run import signals
from ablab.lab.run.code import cache_hashes
from ablab.lab.run.folder import LOG, describe_exit, make_dir
from ablab.lab.run.resume import resume_config

POLL_SECONDS = 1.0  # seconds between two checks of runs in use by another launch


def launch(runs: list[PreparedRun], num_processes: int | str, progress: Progress) -> None:
    """Execute every run that is not done.

    Args:
        runs: in the order in which they start.
        num_processes: runs in parallel; "gpus" for one on each GPU.
        progress: notified when a run starts and ends.

    Raises:
        ConfigError: the number of processes is invalid.
        Stopped: a signal arrived; started runs can be resumed.
    """
    devices = worker_devices(num_processes)
    if len(devices) > 1 and devices[0] is not None:
        for run in runs:
            if isinstance(wanted := run.cfg.trainer.devices, int) and wanted > 1:
                raise ConfigError(
                    f"hydra.launcher.num_processes={num_processes}: each process sees one GPU, and a run with "
                    f"trainer.devices={wanted} needs more; leave num_processes at 1"
                )
    waiting = [run for run in runs if not run.is_done]
    with progress:
        while waiting:
            if len(devices) == 1:
                run_serially(waiting, progress)
            else:
                run_in_parallel(waiting, progress, devices)
            waiting = [run for run in waiting if progress.status[run] == "taken"]
            if waiting:
                time.sleep(POLL_SECONDS)


def worker_devices(num_processes: int | str) -> list[str | None]:
    """Return the GPU of each process as CUDA_VISIBLE_DEVICES names it, or None.

    More processes than GPUs share them evenly; a single process sees all of them.

    Raises:
        ConfigError: the number of processes is invalid.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # set by a cluster, it lists the GPUs of this job
    number = torch.cuda.device_count()
    gpus: list[str | None] = [*(given.split(",") if given else map(str, range(number)))][:number] or [None]
    if num_processes == "gpus":
        return gpus
    if not str(num_processes).isdecimal() or int(num_processes) < 1:
        raise ConfigError(
            f"hydra.launcher.num_processes={num_processes}: give a whole number from 1 on, or gpus for one on each GPU"
        )
    return [None] if int(num_processes) == 1 else [gpus[i % len(gpus)] for i in range(int(num_processes))]


def run_serially(runs: list[PreparedRun], progress: Progress) -> None:
    """Execute runs one after another in this process."""
    for run in runs:
        if run.is_done:  # finished by another launch in the meantime
            progress.run_ended(run, run.status)
            continue
        progress.run_started(run)
        progress.run_ended(run, status := run_cell(run))
        if status == "stopped":
            raise Stopped(signals.requested.name if signals.requested else "a signal")


def run_cell(run: PreparedRun) -> str:
    """Start or resume a run of the grid in this process, and return its status, see `run_logged`."""
    HydraConfig.instance().set_config(run.hydra)
    cfg = run.cfg.copy()
    cfg.quiet = False  # the output goes to the log
    return run_logged(cfg)


def run_logged(cfg: DictConfig) -> str:
    """Start or resume the run whose folder the config names; its output and errors go to its log.txt.

    Returns:
        The status: "finished", "diverged", "failed", "stopped", or "taken" if another process uses the run.
    """
    from ablab.lab.train import train

    with (
        (make_dir(Path(cfg.folder)) / LOG).open("a", buffering=1, encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            train(resume_config(cfg))
        except RunInUse:
            return "taken"
        except Stopped:
            return "stopped"
        except Diverged as error:
            print(f"error: {error}", file=log)
            return "diverged"
        except (ConfigError, RunError) as error:
            print(f"error: {error}", file=log)
            return "failed"
        except Exception:
            traceback.print_exc(file=log)
            return "failed"
    return "finished"


def run_in_parallel(runs: list[PreparedRun], progress: Progress, devices: list[str | None]) -> None:
    """Execute several runs at once, each process one after another.

    The processes are forked from a server process that has only loaded the libraries: no GPU, no threads.
    """
    context = mp.get_context("forkserver")
    start_fork_server()
    threads = max(1, torch.get_num_threads() // len(devices))
    pipes: dict[Connection, PreparedRun | None] = {}
    processes = {}
    for device in devices[: len(runs)]:
        ours, theirs = context.Pipe()
        processes[ours] = context.Process(target=worker_loop, args=(theirs, device, threads, dict(os.environ)))
        processes[ours].start()
        theirs.close()  # only the worker holds its end, so that each side notices when the other is gone
        pipes[ours] = None
    signals.defer()  # signals are forwarded, and the runs may finish their step
    todo = list(reversed(runs))
    forwarded = False
    try:
        for pipe in pipes:
            dispatch(pipe, todo, pipes, progress)
        while any(pipes.values()):
            if signals.requested and not forwarded:
                forwarded = True
                todo.clear()
                for process in processes.values():
                    with suppress(ProcessLookupError):  # it has ended
                        # Ctrl-C in a terminal has sent SIGINT to the workers too, and a second one would kill the run
                        interrupted = signals.requested == signal.SIGINT
                        os.kill(process.pid or 0, signal.SIGTERM if interrupted else signals.requested)
            ready = wait([pipe for pipe, run in pipes.items() if run], timeout=0.2)
            for pipe, run in [(pipe, run) for pipe, run in pipes.items() if pipe in ready and run]:
                try:
                    progress.run_ended(run, pipe.recv())
                except (EOFError, ConnectionError):  # killed, or out of memory: the others continue
                    if not signals.requested:
                        processes[pipe].join()
                        log_exit(run, processes[pipe].exitcode)
                    progress.run_ended(run, "stopped" if signals.requested else "failed")
                    pipes[pipe] = None
                    continue
                dispatch(pipe, todo, pipes, progress)
        for run in todo:  # every process has ended
            progress.run_ended(run, "failed")
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes.values():
            process.join()
        signals.stop_deferring()
    if signals.requested:
        raise Stopped(signals.requested.name)


def log_exit(run: PreparedRun, exit_code: int | None) -> None:
    """Append the reason why a run's process is gone to its log, which the process could not do itself."""
    with suppress(OSError), (run.folder / LOG).open("a", encoding="utf-8") as log:
        print(f"\nerror: {describe_exit(exit_code)}", file=log)


def dispatch(
    pipe: Connection, todo: list[PreparedRun], pipes: dict[Connection, PreparedRun | None], progress: Progress
) -> None:
    """Send the next run to a process, if there is one."""
    pipes[pipe] = None
    while todo:
        run = todo.pop()
        if run.is_done:  # finished by another launch in the meantime
            progress.run_ended(run, run.status)
            continue
        progress.run_started(run)
        pipe.send(run)
        pipes[pipe] = run
        return


@read_once()
@cache_hashes()
def worker_loop(pipe: Connection, device: str | None, num_threads: int, environment: Mapping[str, str]) -> None:
    """Execute the runs that arrive through a pipe until it closes."""
    signals.install()
    signals.defer()  # signals from the parent concern the current run
    mp.set_start_method(None, force=True)  # data loaders start their workers as in any run, not by a fork server
    os.environ.update(environment)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(num_threads)
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        status = run_cell(run)
        signals.defer()
        pipe.send(status)
