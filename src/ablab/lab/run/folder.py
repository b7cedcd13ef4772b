"""Create, find and read the folders of runs without loading heavy libraries."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import re
import shlex
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ablab.errors import ConfigError
from ablab.lab.config.schema import accepts, describe_type, quote_value
from ablab.lab.config.yaml_files import read_yaml
from ablab.lab.run.identity import flat

LOCK = ".lock"  # in a run's folder: held by the process that runs it
LOG = "log.txt"  # in a run's folder: its output, in an ablation or under Slurm
ABLATION = "ablation.json"  # in an ablation's folder: its definition, and the folder of each run

# Keys that the files of a run need for resuming, each with its type; `*` stands for every key of a mapping.
RECORD = {
    "id": "str",
    "status": "Literal['running', 'finished', 'stopped', 'diverged', 'interrupted', 'failed']",
    "overrides": "list[str] | None",
    "identity": "dict",
    "identity.*": "str",
    "identity.code": "str",
    "identity.data": "str",
    "processes": "int",
    "data": "dict",
    "data.fingerprint": "str",
    "git_commit": "str | None",
}
ENVIRONMENT = {
    "python": "str",
    "processor": "str",
    "threads": "dict",
    "threads.torch": "int",
    "accelerators": "list",
    "cuda": "str | None",
    "cudnn": "str | int | None",
    "driver": "str | None",
    "packages": "dict",
    "packages.*": "str",
}
CONFIG = {
    **dict.fromkeys(("task", "trainer", "callbacks", "logger"), "dict"),
    **dict.fromkeys(("model", "norm", "data", "optimizer"), "dict | None"),  # None: the task brings its own
    "seed": "int",
}
# Optional keys of a record.
OPTIONAL = {
    "pid": "int",
    "host": "str",
    "command": "str",
    "started": "str",
    "ended": "str",
    "error": "str",
    "resumed": "list",
    "batch_sizes": "dict",
    "batch_sizes.*": "int",
    "choices": "dict",
    "seconds": "float | None",
    "metrics": "dict",
    "metrics.*": "float | None",
    "weights_sha256": "dict",
    "weights_sha256.*": "str",
    "hidden": "list[str]",
    "sources": "list[dict]",
    "git_problem": "str",
    "profile": "dict | None",
}
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
RANGES = {"threads.torch": (1, 4096), "processes": (1, 1_000_000)}  # OpenMP aborts the process with too many threads


def read_record(folder: Path) -> dict[str, Any]:
    """Return the run.json of a run's folder.

    Raises:
        ConfigError: it cannot be read, or is not what a run writes.
    """
    return read_json(folder, "run.json", RECORD, OPTIONAL)


def read_environment(folder: Path) -> dict[str, Any]:
    """Return the environment.json of a run's folder.

    Raises:
        ConfigError: it cannot be read, or is not what a run writes.
    """
    return read_json(folder, "environment.json", ENVIRONMENT)


def read_json(
    folder: Path, name: str, types: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the content of a JSON file.

    Args:
        folder: of a run or an ablation.
        name: the file name.
        types: the required keys, each with its type.
        optional: optional keys, each with its type.

    Raises:
        ConfigError: the file cannot be read, lacks a key, or has a value of another type.
    """
    try:
        content = json.loads(
            (folder / name).read_text(encoding="utf-8"),
            object_pairs_hook=reject_duplicate_keys,
            parse_constant=parse_finite,
            parse_float=parse_finite,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{folder}: its {name} cannot be read ({error}); bring it back, or begin a new run"
        ) from error
    check_keys(folder, name, content, types, optional)
    return content


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping of a JSON object.

    Raises:
        ValueError: a key occurs twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"its key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return content


def parse_finite(text: str) -> float:
    """Return a number of a JSON file, which must be finite.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(number := float(text)):
        raise ValueError(f"its number {text} is not finite")
    return number


def check_keys(
    folder: Path, name: str, content: Any, types: Mapping[str, str], optional: Mapping[str, str] | None = None
) -> None:
    """Refuse a file that does not have the form that a run writes.

    Raises:
        ConfigError: it lacks a key, or a value has another type.
    """
    found = content if isinstance(content, Mapping) else {}
    required = [key for key in types if "*" not in key]
    if missing := [key for key in required if not any(True for _ in values_at(found, key))]:
        missing = [key for key in missing if key.partition(".")[0] == key or key.partition(".")[0] not in missing]
        problem = f"it lacks {', '.join(sorted(missing))}"
    else:
        problem = "; ".join(type_problems(found, {**types, **(optional or {})}))
    if problem:
        raise ConfigError(
            f"{folder}: its {name} is not what a run writes ({problem}); bring the file back, or begin a new run"
        )


def type_problems(content: Mapping[Any, Any], types: Mapping[str, str]) -> Iterator[str]:
    """Yield the values of wrong types, as key=value."""
    for pattern, kind in types.items():
        annotation = ast.parse(kind, mode="eval").body
        for key, value in values_at(content, pattern):
            low, high = RANGES.get(key, (None, None))
            if not accepts(annotation, value):
                needed = {"dict": "a mapping", "list": "a list"}.get(kind) or describe_type(annotation)
                yield f"{key}={abbreviate(value)}, and {needed} is needed"
            elif low is not None and not low <= value <= high:
                yield f"{key}={abbreviate(value)}, and {low} to {high:,} is needed"


def values_at(content: Any, pattern: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of a mapping at a key such as `data.fingerprint` or `metrics.*`, each with its full key."""
    name, _, rest = pattern.partition(".")
    if not isinstance(content, Mapping):
        return
    for key in [*content] if name == "*" else [name] if name in content else []:
        if rest:
            yield from ((f"{key}.{inner}", value) for inner, value in values_at(content[key], rest))
        else:
            yield str(key), content[key]


def abbreviate(value: Any) -> str:
    """Return a value as JSON, or its beginning."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def group_choices() -> dict[str, Any] | None:
    """Return the choice of each config group; None in a program that composed the config itself."""
    if not HydraConfig.initialized():
        return None
    groups: Any = OmegaConf.to_container(HydraConfig.get().runtime.choices)
    return {group: choice for group, choice in groups.items() if not group.startswith("hydra/")}


TIME_FORMAT = "%Y-%m-%dT%H:%M:%S%z"  # of times in a record
LONGEST_NAME = 200  # bytes; file systems allow 255, with date and number


def check_name(key: str, name: str) -> None:
    """Refuse a name that cannot be the name of a folder in output_dir.

    Args:
        key: the config key of the name, `name` or `ablation.name`.
        name: of a run, an ablation or a search.

    Raises:
        ConfigError: it is empty, a path, too long, or some file system or tool would change or hide it.
    """
    is_path = name.startswith(".") or Path(name).name != name
    is_changed = not name.isprintable() or name != name.strip() or name.endswith(".")
    if not name or is_path or is_changed or len(name.encode()) > LONGEST_NAME:
        raise ConfigError(
            f"{key}={name!r}: it names a folder in output_dir, and is a word, not a path: 1 to {LONGEST_NAME} bytes "
            "that can be printed, without a dot at either end; output_dir says where the folder goes"
        )


def new_folder(parent: Path, name: str) -> Path:
    """Create a new folder; launches within the same second get numbers."""
    check_name("name", name)
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


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that could not start, unless it holds other files."""
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def make_dir(folder: Path) -> Path:
    """Create the folder that a user names, unless it exists."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"folder={folder}: no folder can be made there ({error.strerror})") from error
    return folder.absolute()


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run."""
    return f"python train.py {shlex.quote('resume=' + quote_value(relpath(folder)))}"


def relpath(path: Path) -> str:
    """Return the shortest path to type from the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def failure_reason(folder: Path) -> str:
    """Return the reason why a run failed, from its log and its record; "" if neither has one.

    An `error: …` line at the end of the log is newer than the record, which a failed launch may not update. The last
    line of the log alone is no reason: it may be a progress bar or a warning of a killed process.
    """
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    begun = max((i for i, line in enumerate(lines) if line.startswith("run: ")), default=0)
    lines = [line for line in lines[begun:] if line.strip()]
    from_slurm = [line for line in lines if line.startswith(("srun: ", "slurmstepd"))]
    lines = [line for line in lines if line not in from_slurm]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if errors and all(line.startswith(" ") for line in lines[errors[-1] + 1 :]):
        return lines[errors[-1]].removeprefix("error: ")
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if isinstance(record, dict) and (error := str(record.get("error", "")).strip()):
            return error.splitlines()[0]
    except (OSError, ValueError, RecursionError):
        pass  # reported elsewhere, by the status and on the page of runs
    traces = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    ends = [line for line in lines[traces[-1] + 1 :] if not line.startswith(" ")] if traces else []
    if ends:
        return ends[0]
    return lines[errors[-1]].removeprefix("error: ") if errors else slurm_reason(from_slurm)


# Phrases in Slurm's messages, and the reason to report.
SLURM_ENDINGS = {
    "oom": "killed by Slurm: out of memory",
    "out of memory": "killed by Slurm: out of memory",
    "due to time limit": "ended by Slurm: its time was over",
    "due to preemption": "ended by Slurm: preempted",
    "due to node failure": "ended by Slurm: its node failed",
    "cancelled": "ended by Slurm: cancelled",
    "killed": "killed by SIGKILL (often out of memory)",
}


def slurm_reason(lines: Iterable[str]) -> str:
    """Return the reason why a job ended, from Slurm's lines in its log; "" if they have none."""
    text = "\n".join(lines).lower()
    return next((reason for words, reason in SLURM_ENDINGS.items() if words in text), "")


def describe_exit(exit_code: int | None) -> str:
    """Describe the exit code of a process that ended without a message."""
    if exit_code is None or exit_code >= 0:
        return f"its process ended with exit code {exit_code} and without a message"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    causes = {"SIGKILL": " (often out of memory)", "SIGBUS": " (often a full /dev/shm)"}
    return f"killed by {name}{causes.get(name, '')}"


def timestamp() -> str:
    return time.strftime(TIME_FORMAT)


def read_config(folder: Path) -> DictConfig:
    """Return the resolved config of a run from its folder, with `trust` set to false.

    Raises:
        ConfigError: the folder is not a run, its config cannot be read, or it belongs to a project of another name.
    """
    for name in ("run.json", "config.yaml"):
        if not (folder / name).exists():
            raise ConfigError(f"{folder}: it is not a run's folder; there is no {name} in it")
    try:
        cfg = read_yaml(folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"{folder}: its config.yaml cannot be read ({error}); bring it back") from error
    content = OmegaConf.to_container(cfg)
    check_keys(folder, "config.yaml", content, CONFIG)
    for key, value in flat(content).items():  # a run writes resolved values, so this is an edit by hand
        if isinstance(value, str) and INTERPOLATION.search(value):
            raise ConfigError(
                f"{folder}: its config.yaml has {key}={value}, which is not resolved and could read this machine's "
                "environment; write the value itself there"
            )
        if isinstance(value, str) and "***" in value and not key.startswith("logger."):
            raise ConfigError(
                f"{folder}: its config.yaml has {key}={value}, a value that an earlier version has hidden; write the "
                "value itself there, or begin a new run"
            )
    assert isinstance(cfg, DictConfig)
    maker, here = str(OmegaConf.select(cfg, "task._target_")).partition(".")[0], __name__.partition(".")[0]
    if maker.isidentifier() and maker != "None" and importlib.util.find_spec(maker) is None:
        raise ConfigError(
            f"{folder}: it was made by {maker}, which is not here, and this is {here}; go on with it where {maker} is, "
            "or begin it anew"
        )
    for key, default in (("quiet", False), ("dry_run", True)):
        if key not in cfg:
            cfg[key] = default  # runs of earlier versions lack the key
    cfg.trust = False
    return cfg
