"""A run's folder: created exclusively, written so that a person can read it, closed with how the run ended."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from ablab.config.errors import ConfigError
from ablab.runs.metrics import MetricsCSV

PASSED_ON = "ABLAB_RUN_FOLDER"  # how the processes that rank 0 starts learn the run's folder
RECORDED_PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "numpy", "scikit-learn")


class Run:
    """One run and its folder; as a context manager it records how the run ended, crashes included.

    The folder holds `config.yaml` (resolved), `run.json` (command, code, versions, how it ended and with which
    metrics), `metrics.csv`, `checkpoints/`, and what callbacks and loggers add.

    Args:
        folder: the run's folder, which exists.
        config: the resolved config as plain data.
        owner: whether this process writes the record; the other processes of the run do not.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, owner: bool) -> None:
        self.folder = folder
        self.config = config
        self.owner = owner
        self.record: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.loggers: list[Logger] = []

    @classmethod
    def create(cls, cfg: DictConfig, **facts: Any) -> Run:
        """Make the folder of a new run, `<output_dir>/<date>_<time>_<name>`, or join the one that rank 0 made.

        Args:
            cfg: the composed config.
            facts: what else is to be recorded, beside the config, in run.json and by every logger.

        Raises:
            ConfigError: there can be no such folder.
        """
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        if int(os.environ.get("LOCAL_RANK", "0")) > 0 and PASSED_ON in os.environ:
            return cls(Path(os.environ[PASSED_ON]), config, owner=False)
        run = cls(new_folder(Path(cfg.output_dir), cfg.name), config, owner=True)
        os.environ[PASSED_ON] = str(run.folder)
        (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        run.record = {
            "status": "running",
            "command": shlex.join([sys.executable, *sys.argv]),
            "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
            "started": now(),
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in RECORDED_PACKAGES},
            **facts,
        }
        run.facts = facts
        run.write()
        return run

    def start(self, loggers: Iterable[Logger]) -> list[Logger]:
        """Tell every logger what this run is.

        Returns:
            The loggers of the run: metrics.csv, which is always written, and those given.
        """
        self.loggers = [MetricsCSV(self.folder), *loggers]
        facts = {"run": {"folder": str(self.folder), "git_commit": self.record.get("git_commit"), **self.facts}}
        for logger in self.loggers:
            logger.log_hyperparams({**self.config, **facts})
            if hasattr(logger, "announce"):
                logger.announce()
        return self.loggers

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status = "finished"
        if kind is not None:
            status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
            self.record["error"] = f"{kind.__name__}: {error}"
        # JSON has no NaN and no infinity: what diverged is null
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        self.record |= {"status": status, "ended": now(), "metrics": metrics}
        self.write()
        for logger in self.loggers:
            logger.save()
            if hasattr(logger, "close"):
                logger.close(exit_code=0 if kind is None else 1)
        if self.owner:
            os.environ.pop(PASSED_ON, None)

    def write(self) -> None:
        """Write run.json, whole or not at all."""
        if self.owner:
            temporary = self.folder / "run.json.tmp"
            temporary.write_text(json.dumps(self.record, indent=2) + "\n")
            temporary.replace(self.folder / "run.json")


def new_folder(parent: Path, name: str) -> Path:
    """A folder that did not exist a moment ago; launches in the same second get numbers."""
    if Path(name).name != name:
        raise ConfigError(
            f"name={name}: it ends the name of the run's folder and is a word, not a path; see output_dir"
        )
    stem = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{name}"
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}_{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ConfigError(f"output_dir={parent}: no folder can be made there ({error.strerror})") from error
        else:
            return folder.absolute()


def short(path: Path) -> str:
    """A path as it is shortest to type from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_commit() -> str | None:
    """The commit of the code, with "+changes" where the working tree differs; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
