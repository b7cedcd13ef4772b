"""Run folders, from outside: made, found and read without loading anything heavy."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ablab.config.errors import ConfigError
from ablab.config.schema import quoted
from ablab.runs.outcome import RunError

LOG = "log.txt"  # in a run's folder: what it printed, in an ablation or under Slurm
ABLATION = "ablation.json"  # in an ablation's: what was asked for, and which folder is which run

# What a run's files have to say for the run to be gone on with.
RECORD = {"id", "status", "overrides", "identity", "processes", "batch_sizes", "data", "git_commit"}
ENVIRONMENT = {"python", "processor", "threads", "accelerators", "cuda", "cudnn", "driver", "packages"}
CONFIG = {"model", "norm", "data", "task", "optimizer", "trainer", "callbacks", "logger", "seed"}


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a run's folder.

    Raises:
        ConfigError: it cannot be read, or is not what a run writes.
    """
    return read_json(folder, "run.json", RECORD)


def read_environment(folder: Path) -> dict[str, Any]:
    """The environment.json of a run's folder.

    Raises:
        ConfigError: it cannot be read, or is not what a run writes.
    """
    return read_json(folder, "environment.json", ENVIRONMENT)


def read_json(folder: Path, name: str, keys: set[str]) -> dict[str, Any]:
    """A file of a run's folder that has some keys at least."""
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: its {name} cannot be read ({error}); bring it back, or begin a new run"
        ) from error
    check_keys(folder, name, content, keys)
    return content


def check_keys(folder: Path, name: str, content: Any, keys: set[str]) -> None:
    """Refuse a file that is not what a run writes."""
    missing = keys - content.keys() if isinstance(content, dict | DictConfig) else keys
    if missing:
        raise ConfigError(
            f"{folder}: its {name} is not what a run writes (it lacks {', '.join(sorted(missing))}); bring the file "
            "back, or begin a new run"
        )


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when it is complete and on the disk.

    Raises:
        RunError: there is no room for it; what was there before is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps what the disk answered
        raise not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too
    finally:
        os.close(directory)


def not_written(path: Path, error: Exception) -> RunError:
    """What is said of a file that could not be written."""
    return RunError(
        f"{path}: it could not be written ({error}); the run ends here, the checkpoints before it are intact. "
        "With room on the disk, resume the run"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text)


def own_overrides() -> list[str] | None:
    """The words of the command line that chose the config; None in a program that composed it itself."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None


def own_choices() -> dict[str, Any] | None:
    """The choice of each group, whoever made it; None in a program that composed the config itself."""
    if not HydraConfig.initialized():
        return None
    groups: Any = OmegaConf.to_container(HydraConfig.get().runtime.choices)
    return {group: choice for group, choice in groups.items() if not group.startswith("hydra/")}


STAMP = "%Y-%m-%dT%H:%M:%S%z"  # of a time in a record
LONGEST_NAME = 200  # with the date and a number, a file system takes 255


def new_folder(parent: Path, name: str) -> Path:
    """A folder that did not exist a moment ago; launches in the same second get numbers."""
    if not name or name in (".", "..") or Path(name).name != name or not name.isprintable() or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"name={name!r}: it ends the name of the run's folder and is a word, not a path; 1 to {LONGEST_NAME} "
            "characters that can be printed; see output_dir"
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


def made(folder: Path) -> Path:
    """The folder that a person names, which need not be new."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder={folder}: no folder can be made there ({error.strerror})") from error
    return folder.absolute()


def go_on_command(folder: Path) -> str:
    """What is typed to go on with a run."""
    return f"python train.py {shlex.quote('resume=' + quoted(short(folder)))}"


def short(path: Path) -> str:
    """A path as it is shortest to type from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def last_line(log: Path) -> str:
    """The last line of a log, which of a traceback is the error; "" where there is none. Slurm's own do not count."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    lines = [line for line in lines if not line.startswith(("srun: ", "slurmstepd"))]
    return lines[-1] if lines else ""


def now() -> str:
    return time.strftime(STAMP)


def config_of(folder: Path) -> DictConfig:
    """The resolved config of a run, from its folder.

    Raises:
        ConfigError: the folder is not a run's, or the run is of a project of another name.
    """
    for name in ("run.json", "config.yaml"):
        if not (folder / name).exists():
            raise ConfigError(f"{folder}: it is no run's folder; there is no {name} in it")
    try:
        cfg = OmegaConf.load(folder / "config.yaml")
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder}: its config.yaml cannot be read ({reason}); bring it back") from error
    check_keys(folder, "config.yaml", cfg, CONFIG)
    assert isinstance(cfg, DictConfig)
    maker, here = str(OmegaConf.select(cfg, "task._target_")).partition(".")[0], __name__.partition(".")[0]
    if maker != "None" and importlib.util.find_spec(maker) is None:
        raise ConfigError(
            f"{folder}: it was made by {maker}, which is not here, and this is {here}; go on with it where {maker} is, "
            "or begin it anew"
        )
    if "quiet" not in cfg:
        cfg.quiet = False  # a run from before there was such a key
    return cfg
