"""Run folders, from outside: made, found and read without loading anything heavy."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ablab.config.errors import ConfigError


def read_record(folder: Path) -> dict[str, Any]:
    """The run.json of a run's folder.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: its run.json cannot be read ({error}); bring it back, or begin a new run"
        ) from error


def read_environment(folder: Path) -> dict[str, Any]:
    """The environment.json of a run's folder."""
    return json.loads((folder / "environment.json").read_text())


def own_overrides() -> list[str] | None:
    """The words of the command line that chose the config; None in a program that composed it itself."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None


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


def short(path: Path) -> str:
    """A path as it is shortest to type from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def config_of(folder: Path) -> DictConfig:
    """The resolved config of a run, from its folder.

    Raises:
        ConfigError: the folder is not a run's.
    """
    for name in ("run.json", "config.yaml"):
        if not (folder / name).exists():
            raise ConfigError(f"{folder}: it is no run's folder; there is no {name} in it")
    try:
        cfg = OmegaConf.load(folder / "config.yaml")
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder}: its config.yaml cannot be read ({reason}); bring it back") from error
    assert isinstance(cfg, DictConfig)
    return cfg
