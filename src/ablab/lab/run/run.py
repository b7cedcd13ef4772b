"""The folder of a run: created exclusively, readable for people, and completed with how the run ended."""

from __future__ import annotations

import json
import math
import os
import secrets
import shlex
import socket
import string
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from ablab.disk import Lock, atomic_write, first_missing_dir, write_text
from ablab.errors import CRASHED, FINISHED, STOPPED, ConfigError, Diverged, RunError, RunInUse, Stopped
from ablab.lab.launch.processes import broadcast
from ablab.lab.loggers.csv_file import MetricsCSV, read_rows
from ablab.lab.loggers.trackers import build_loggers, has_failed, tracker_ids
from ablab.lab.run import checkpoint_files, provenance, signals
from ablab.lab.run.code import cache_hashes, code_of
from ablab.lab.run.folder import (
    LOCK,
    LOG,
    group_choices,
    make_dir,
    new_folder,
    read_config,
    read_environment,
    read_record,
    remove_if_empty,
    timestamp,
)
from ablab.lab.run.git import Checkout, GitError
from ablab.lab.run.identity import identity, plain
from ablab.lab.run.redaction import redact, redact_loggers, redact_overrides
from ablab.lab.run.resume import own_overrides

DESCRIPTION_FILES = ("config.yaml", "environment.json", "changes.patch", "run.json")  # written before training
# Files that the folder of a new run may hold: those of an ablation or Slurm, and leftovers of a killed process.
ALLOWED_FILES = {LOCK, LOG, *DESCRIPTION_FILES, *(f"{name}.tmp" for name in DESCRIPTION_FILES)}


class Run:
    """One run and its folder; as a context manager, it records how the run ended, crashes included.

    The folder holds `config.yaml` (resolved), `run.json` (command, code, status and metrics), `environment.json`
    (versions, devices, threads), `changes.patch` (uncommitted changes), `metrics.csv`, `checkpoints/`, and the files of
    callbacks and loggers.

    Args:
        folder: the run's folder, which exists.
        config: the resolved config as plain data.
        is_owner: this process writes the record; the other processes of the run do not.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, is_owner: bool) -> None:
        self.folder = folder
        self.config = config
        self.is_owner = is_owner
        self.record: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, str] = {}
        self.seconds: float | None = None  # training time, validation included
        self.loggers: list[Logger] = []
        self.checkpoint: Path | None = None
        self.rows: list[dict[str, Any]] = []
        self.checkout = Checkout(folder, None)
        self.lock = Lock(folder / LOCK)

    @classmethod
    def open(
        cls,
        cfg: DictConfig,
        *,
        data: dict[str, Any],
        rank: int = 0,
        world_size: int = 1,
        check_state: Callable[[Path, dict[str, Any]], None] | None = None,
        **facts: Any,
    ) -> Run:
        """Create the folder of a new run, or resume the run that `cfg.resume` names.

        `cfg.folder`, if set, is the folder of the new run. Rank 0 does the work, the other ranks join.

        Args:
            cfg: the composed config.
            rank, world_size: of this process.
            data: facts of the data to record, their fingerprint included.
            check_state: raises a ValueError for a checkpoint that cannot be resumed from.
            facts: other facts to record beside the config, in run.json and by every logger.

        Raises:
            ConfigError: the folder cannot be created, or the run cannot be resumed.
        """
        signals.defer()  # from the first file on, there is something to save
        try:
            return cls._open(cfg, {"processes": world_size, "data": data, **facts}, rank=rank, check_state=check_state)
        except BaseException:
            signals.stop_deferring()
            raise

    @classmethod
    def finished(cls, folder: Path, metrics: dict[str, float], weights: dict[str, str]) -> Run:
        """Return a run that other processes have finished, with what they have found."""
        run = cls(folder, plain(read_config(folder)), is_owner=False)
        run.record, run.metrics, run.weights = read_record(folder), metrics, weights
        run.seconds = run.record["seconds"]
        return run

    @classmethod
    def _open(cls, cfg: DictConfig, facts: dict[str, Any], *, rank: int, check_state: Any) -> Run:
        """Return the run that rank 0 has created or resumed."""
        world_size = facts["processes"]
        if cfg.resume is not None:  # another number of threads rounds differently
            torch.set_num_threads(read_environment(Path(str(cfg.resume)))["threads"]["torch"])
        if rank > 0:
            problem, folder, checkpoint = broadcast(None, world_size)
            if problem:
                raise ConfigError(problem)
            run = cls(folder, plain(cfg), is_owner=False)
            run.facts = facts
            run.checkpoint = checkpoint
            return run
        try:
            run = cls._begin(cfg, facts, check_state)
        except ConfigError as error:
            broadcast((str(error), None, None), world_size)
            raise
        broadcast((None, run.folder, run.checkpoint), world_size)
        return run

    @classmethod
    def _begin(cls, cfg: DictConfig, facts: dict[str, Any], check_state: Any = None) -> Run:
        """Create or resume a run in the process that writes its record."""
        if cfg.resume is not None:
            folder = Path(str(cfg.resume)).absolute()
        else:
            folder = (
                new_folder(Path(cfg.output_dir), cfg.name) if cfg.folder is None else make_dir(Path(str(cfg.folder)))
            )
        run = cls(folder, plain(cfg), is_owner=True)
        run.facts = facts
        run.lock_folder(new=cfg.resume is None)
        try:
            with cache_hashes():  # identity, sources and changes must describe the same code
                if cfg.resume is None:
                    run.create_record()
                else:
                    run.resume_record(check_state)
        except BaseException:
            run.lock.release()  # a notebook may try again in this process
            raise
        return run

    def lock_folder(self, *, new: bool) -> None:
        """Lock the folder for the lifetime of this process.

        Args:
            new: the run is a new one.

        Raises:
            RunInUse: another process uses the run, or has just created it.
        """
        try:
            is_ours = self.lock.acquire(seconds=0.2)  # a process that checks the lock holds it for a moment
        except OSError as error:
            if new:
                remove_if_empty(self.folder)
            raise ConfigError(
                f"{self.folder}: nothing can be written there ({error.strerror}); make it writable, or use another"
            ) from error
        if not is_ours:
            owner = read_record(self.folder) if (self.folder / "run.json").exists() else {}
            raise RunInUse(
                f"resume={self.folder}: this run is in use by process {owner.get('pid')} on {owner.get('host')}; "
                "end it first, or wait"
            )
        if not self.lock.is_kept:
            print(
                f"warning: {self.folder}: its file system has no file locks (flock), so nothing keeps a second process "
                "from writing to this run; make sure that there is one",
                file=sys.stderr,
            )
        if new and (self.folder / "run.json").exists():
            self.lock.release()
            raise RunInUse(
                f"folder={self.folder}: another process has begun this run a moment ago; give the command again"
            )
        if new and (foreign := sorted({path.name for path in self.folder.iterdir()} - ALLOWED_FILES)):
            self.lock.release()
            raise ConfigError(
                f"folder={self.folder}: the directory is not empty and is not a run ({', '.join(foreign[:3])}); name a "
                "new one"
            )

    def create_record(self) -> None:
        """Write the description of a new run.

        Raises:
            ConfigError: the disk is full or the folder is not writable; no file is left behind.
        """
        try:
            self.write_description()
        except (OSError, RunError) as error:
            for name in DESCRIPTION_FILES:
                (self.folder / name).unlink(missing_ok=True)
            self.lock.release()
            remove_if_empty(self.folder)
            reason = error.__cause__ or error
            raise ConfigError(
                f"{self.folder}: a run cannot be written there ({reason}); make room, or choose another output_dir"
            ) from error

    def write_description(self) -> None:
        config, hidden = redact_loggers(self.config)
        write_text(self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
        write_text(self.folder / "environment.json", json.dumps(provenance.environment(), indent=2) + "\n")
        about_process, patch = self.process_facts(), b""
        try:
            patch = self.checkout.patch()
        except (GitError, OSError) as error:
            about_process["git_problem"] = warn_of_git(f"changes.patch is missing: {error}")
        if patch:
            with atomic_write(self.folder / "changes.patch") as temporary:
                temporary.write_bytes(patch)
        alphabet = string.ascii_lowercase + string.digits
        self.record = {
            "id": sweep_agent_id() or "".join(secrets.choice(alphabet) for _ in range(8)),
            "status": "running",
            **about_process,
            **({"hidden": hidden} if hidden else {}),
            **({} if (choices := group_choices()) is None else {"choices": choices}),
            "identity": self.identity(),
            "sources": code_of(self.config).sources,
            **self.facts,
        }
        self.write()

    def resume_record(self, check_state: Any = None) -> None:
        """Find the checkpoint, and record that the run is resumed."""
        self.record = read_record(self.folder)
        if self.record["status"] == "finished" and self.config["folder"] is not None:  # since this process checked
            self.lock.release()
            raise RunInUse(f"resume={self.folder}: another process has just finished this run; nothing is left to do")
        then, here = self.record, self.facts
        sizes, now_sizes = then.get("batch_sizes", {}), here.get("batch_sizes", {})  # external modules have none
        if now_sizes.keys() - sizes.keys():
            raise ConfigError(
                f"resume={self.folder}: its run.json is not what a run writes (it lacks batch_sizes); bring the file "
                "back, or begin a new run"
            )
        if then["processes"] != here["processes"] and sizes.get("norm") != now_sizes.get("norm"):
            raise ConfigError(
                f"resume={self.folder}: it would become another run: its norm sees {sizes['norm']} "
                f"samples at once on {then['processes']} processes, and would see {now_sizes['norm']} on "
                f"{here['processes']}; give it as many processes as it had, or begin a new run"
            )
        if self.record["identity"]["data"] != self.identity()["data"]:
            raise ConfigError(
                f"resume={self.folder}: the data are not those of the run (fingerprint "
                f"{self.facts['data']['fingerprint'][:12]}, {self.record['data']['fingerprint'][:12]} then); "
                "give the same files"
            )
        self.find_checkpoint(check_state)
        changes = provenance.changes_since(self.record, read_environment(self.folder), self.config)
        if then["processes"] != here["processes"]:
            changes.insert(
                0,
                f"processes: {then['processes']} then, {here['processes']} now; sums are rounded otherwise, and what a "
                "step draws at random (dropout, partners in mixing) comes out otherwise",
            )
        if changes:
            lines = ["warning: what follows may differ from what an uninterrupted run finds; not as it was:", *changes]
            print(*lines, sep="\n  ", file=sys.stderr)
        self.record.setdefault("resumed", []).append(self.process_facts())
        self.record |= {"status": "running", "pid": os.getpid(), "host": socket.gethostname()}
        for name in ("error", "ended"):
            self.record.pop(name, None)
        self.write()

    def identity(self) -> dict[str, str]:
        """Return hashes of everything that can change the result."""
        data, processes = self.facts["data"]["fingerprint"], self.facts["processes"]
        return identity(self.config, code=code_of(self.config).digest, data=data, processes=processes)

    def process_facts(self) -> dict[str, Any]:
        """Return facts of the process that trains; print a warning if no commit can be recorded."""
        self.checkout = provenance.checkout()
        words = own_overrides()
        problem = self.checkout.problem
        return {
            "command": shlex.join(redact(provenance.command())),
            "overrides": None if words is None else redact_overrides(words),
            "started": timestamp(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "git_commit": None if problem else str(self.checkout),
            **({"git_problem": warn_of_git(f"no commit of the code is recorded: {problem}")} if problem else {}),
            "processes": self.facts["processes"],
        }

    def find_checkpoint(self, check_state: Callable[[Path, dict[str, Any]], None] | None) -> None:
        """Find the newest checkpoint to resume from, and the rows of metrics.csv up to it.

        Raises:
            ConfigError: no sound checkpoint fits, or metrics.csv has fewer rows.
        """
        found = checkpoint_files.newest_valid(
            self.folder / "checkpoints",
            lambda text: print(f"warning: {text}", file=sys.stderr),
            run=self.record["id"],
            check=check_state,
        )
        if found is None:
            if checkpoint_files.list_checkpoints(self.folder / "checkpoints"):
                print(f"warning: no checkpoint of {self.folder} is sound; the run begins anew", file=sys.stderr)
            return
        self.checkpoint, state = found
        try:
            self.rows = read_rows(self.folder)[: state["num_rows"]]
        except (ValueError, OSError) as error:
            raise ConfigError(
                f"resume={self.folder}: its metrics.csv cannot be read ({error}); bring the file back, or begin a new "
                "run"
            ) from error
        if len(self.rows) < state["num_rows"]:
            raise ConfigError(
                f"resume={self.folder}: metrics.csv has {len(self.rows)} rows, and {state['num_rows']} had been "
                f"written when {self.checkpoint.name} was; bring the file back, or begin a new run"
            )

    def start_loggers(self, nodes: Mapping[str, DictConfig | None]) -> list[Logger]:
        """Build the loggers of the run, and log its config.

        Args:
            nodes: the configs of the loggers beside metrics.csv, by name; None leaves one out.

        Returns:
            The loggers: metrics.csv, which is always written, and the others.
        """
        step = 1 + max((int(row["step"]) for row in self.rows), default=-1)
        ids = self.record.get("trackers", {})
        trackers = build_loggers(nodes, self.folder, step=step, ids=ids)
        facts = {"run": {"folder": str(self.folder), "git_commit": self.record.get("git_commit"), **self.facts}}
        for name, logger in trackers.items():
            if hasattr(logger, "begin"):
                logger.begin(self.record.get("id", ""), self.rows)
            if name in ids:
                continue  # MLflow refuses other values for the params of a run, `resume` among them
            logger.log_hyperparams(redact({**self.config, **facts}))
        trackers = {name: logger for name, logger in trackers.items() if not has_failed(logger)}  # Lightning asks them
        self.loggers = [MetricsCSV(self.folder, rows=list(self.rows)), *trackers.values()]
        if self.is_owner and (ids := tracker_ids(trackers)):
            self.record["trackers"] = {**self.record.get("trackers", {}), **ids}
            self.write()
        return self.loggers

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status, exit_code = status_and_exit_code(error)
        if error is not None:
            self.record["error"] = redact(f"{type(error).__name__}: {error}")
        # JSON has neither NaN nor infinity: diverged metrics are null
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        self.record |= {"status": status, "ended": timestamp(), "seconds": self.seconds}
        self.record |= {"metrics": metrics, "weights_sha256": self.weights}
        there = first_missing_dir(self.folder) is None  # if the folder is gone, that is the error that ended the run
        if there:
            self.try_to(self.write)
        for logger in self.loggers:
            if there:
                self.try_to(logger.save)
            if hasattr(logger, "close"):
                self.try_to(logger.close, exit_code)
        self.lock.release()
        signals.stop_deferring()

    def try_to(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Run one step of the cleanup; a full disk must not prevent the others."""
        try:
            step(*arguments)
        except (OSError, RunError) as problem:
            print(f"warning: {self.folder}: {problem}", file=sys.stderr)

    def write(self) -> None:
        """Write run.json atomically."""
        if self.is_owner:
            write_text(self.folder / "run.json", json.dumps(self.record, indent=2) + "\n")


def warn_of_git(problem: str) -> str:
    """Warn that the code is not fully recorded, and return the reason for run.json."""
    print(f"warning: {problem}; run.json has a hash of the code", file=sys.stderr)
    return problem


def sweep_agent_id() -> str | None:
    """Return the id that the agent of a W&B sweep has given to its run."""
    return os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None


def status_and_exit_code(error: BaseException | None) -> tuple[str, int]:
    """Return the status for run.json and the exit code."""
    if error is None:
        return "finished", FINISHED
    if isinstance(error, Stopped):
        return "stopped", STOPPED
    # Lightning turns Ctrl-C into SystemExit
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return "interrupted", CRASHED
    if isinstance(error, RunError):
        return ("diverged" if isinstance(error, Diverged) else "failed"), error.exit_code
    return "failed", CRASHED
