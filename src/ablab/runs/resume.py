"""`resume=FOLDER`: the config that a run had, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from ablab.config.errors import ConfigError
from ablab.runs.folder import config_of, own_overrides, read_record
from ablab.runs.identity import PLACES, differences, flat, only_sharing, plain
from ablab.runs.place import rank


def resumed(cfg: DictConfig) -> DictConfig:
    """The config of the run to go on with: what `cfg.resume` names, with what the command line changes.

    A run that has been begun in `cfg.folder` is gone on with too; its whole config is the command's. `cfg` otherwise.

    Raises:
        ConfigError: the folder is not a run's, or the run would become another one.
    """
    if cfg.resume is None:
        return cfg if cfg.folder is None else gone_on(cfg)
    folder = Path(str(cfg.resume))
    try:
        old = config_of(folder)
    except ConfigError as error:
        raise ConfigError(f"resume={error}") from error
    changes = [word for word in own_overrides() or [] if not word.lstrip("+").startswith(("resume=", "trust="))]
    for word in changes:
        if word.partition("=")[0] in ("name", "output_dir", "folder"):
            raise ConfigError(f"{word}: a run that is gone on with stays where it is; leave it out")
    new = compose("train", [*first_words(folder), *changes]) if changes else old
    if found := forbidden(old, new):
        raise ConfigError(report(folder, found))
    OmegaConf.update(new, "resume", str(folder))
    OmegaConf.update(new, "trust", cfg.trust is not None and cfg.trust)  # false: the folder may be somebody else's
    return new


def gone_on(cfg: DictConfig) -> DictConfig:
    """The config, with `resume` where `folder` has a run."""
    folder = Path(str(cfg.folder))
    if not (folder / "run.json").exists():
        return cfg
    if rank() > 0 and read_record(folder)["status"] != "finished":
        return cfg  # the first process decides, which may just have begun it
    old = config_of(folder)
    if found := [*forbidden(old, cfg), *other_places(old, cfg)]:
        raise ConfigError(report(folder, found, "folder"))
    OmegaConf.update(cfg, "resume", str(folder))
    return cfg


def is_finished(cfg: DictConfig) -> bool:
    """Whether the run to resume has nothing left to do; it is then said, with what it found."""
    if cfg.resume is None:
        return False
    record = read_record(Path(cfg.resume))
    if record["status"] == "finished":
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items() if value is not None)
        print(f"{cfg.resume}: this run has finished, nothing is left to do: {metrics}")
    return record["status"] == "finished"


def other_places(old: DictConfig, new: DictConfig) -> list[tuple[str, Any, Any]]:
    """The places of the data that differ: what is there now may be other data than a finished run saw."""
    before, after = flat(plain(old)), flat(plain(new))
    return [
        (key, before[key], after[key])
        for key in PLACES
        if key in before and key in after and not same_place(before[key], after[key])
    ]


def same_place(a: Any, b: Any) -> bool:
    """Whether two paths, or none, are the same from here."""
    return a == b or (a is not None and b is not None and Path(a).resolve() == Path(b).resolve())


def first_words(folder: Path) -> list[str]:
    """The command line with which a run began.

    Raises:
        ConfigError: it began in a program, or its words read the environment or set up Hydra.
    """
    words: list[str] | None = read_record(folder)["overrides"]
    if words is None:
        raise ConfigError(f"{folder}: this run was not started by train.py; it has no words to change, so give none")
    for word in words:
        if re.search(r"\$\{[^}]*:", word) or word.lstrip("+~").startswith("hydra"):
            raise ConfigError(
                f"{folder}: {word} in its run.json would be evaluated here, where it may mean something else; leave "
                "the changes out, its config.yaml has the values"
            )
    return words


def forbidden(old: DictConfig, new: DictConfig) -> list[tuple[str, Any, Any]]:
    """The differences that make another run, with both values.

    Another number of processes is none of them; whether a norm would then see other batches, `Run` asks.
    """
    return [found for found in differences(plain(old), plain(new)) if not only_sharing(*found)]


def report(folder: Path, found: Iterable[tuple[str, Any, Any]], key: str = "resume") -> str:
    """What would make another run of it."""
    lines = [f"{key}={folder}: it would become another run:"]
    lines += [f"  {key}: {old} in the run, {new} now" for key, old, new in found]
    return "\n".join([*lines, "  leave the change out, or begin a new run with it"])
