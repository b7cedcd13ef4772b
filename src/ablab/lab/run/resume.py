"""`resume=FOLDER`: resume a run with the config that it had."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ablab.errors import ConfigError
from ablab.lab.run.folder import read_config, read_record
from ablab.lab.run.identity import DATA_PATHS, affects_only_sharing, flat, plain, result_differences, without_effect
from ablab.rank import rank


def hydra_argv(argv: Sequence[str]) -> list[str]:
    """Return the command line for Hydra, without the overrides beside `resume=`.

    Hydra would compose them with the default config, which lacks the keys of other data, models and loggers;
    `resume_config` composes them with the overrides of the run. When Hydra only shows a config, it gets those as well.

    Raises:
        ConfigError: `resume=` in a sweep.
    """
    argv = force_add_open_keys(argv)
    if (folder := run_to_resume(argv)) is None:
        return list(argv)
    flags = {word.partition("=")[0] for word in argv if word.startswith("-")}
    if flags & {"-m", "--multirun"}:
        raise single_run_error(f"resume={folder}")
    if flags & {"-c", "--cfg", "-i", "--info"}:
        own = read_record(folder)["overrides"] if (folder / "run.json").exists() else None
        check_overrides(folder, own or [])
        first = min(i for i, word in enumerate(argv) if i and is_override(word))
        return [*argv[:first], *(own or []), *argv[first:]]
    changes = overrides_beside_resume(argv)
    return [word for word in argv if word not in changes]


def force_add_open_keys(overrides: Sequence[str]) -> list[str]:
    """Let overrides of `task.` and `data.` add keys for external classes (`task=lightning`).

    Hydra refuses keys that no YAML has; the keys are still checked against the signature of the class.
    """
    is_open = {word.partition("=")[0] for word in overrides if word in ("task=lightning", "data=lightning")}
    return [
        f"++{word}" if word.partition(".")[0] in is_open and "=" in word and "." in word.partition("=")[0] else word
        for word in overrides
    ]


def single_run_error(word: str) -> ConfigError:
    """Return the error for an override that names the folder of one run in a sweep."""
    return ConfigError(
        f"{word}: each run of a sweep has its own folder, and the same command goes on with those that are not done; "
        "leave it out"
    )


def run_to_resume(argv: Sequence[str]) -> Path | None:
    """Return the folder that a command line resumes; None for a new run, or if Hydra will refuse the command."""
    with suppress(HydraException):
        overrides = [word for word in argv[1:] if is_override(word) and key_of(word) == "resume"]
        values = [override.value() for override in OverridesParser.create().parse_overrides(overrides)]
        if values and values[-1] is not None:
            return Path(values[-1].text if isinstance(values[-1], QuotedString) else str(values[-1]))
    return None


def is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def overrides_beside_resume(argv: Sequence[str]) -> list[str]:
    """Return the overrides of a command line that resumes a run; empty for any other."""
    if run_to_resume(argv) is None:
        return []
    for_hydra = r"(resume|trust|hydra)([=./@]|$)"
    return [word for word in argv[1:] if is_override(word) and not re.match(for_hydra, word.lstrip("+~"))]


def key_of(word: str) -> str:
    """Return the key that an override sets."""
    return word.partition("=")[0].lstrip("+~")


def own_overrides() -> list[str] | None:
    """Return the overrides of the command line; None in a program that composed the config itself."""
    if not HydraConfig.initialized():
        return None
    overrides = list(HydraConfig.get().overrides.task)
    resumes = any(key_of(word) == "resume" for word in overrides)
    return [*overrides, *(word for word in overrides_beside_resume(sys.argv) if resumes and word not in overrides)]


def resume_config(cfg: DictConfig) -> DictConfig:
    """Return the config of the run to resume, with the changes from the command line.

    An existing run in `cfg.folder` is resumed as well, with the config of the command. Otherwise, return `cfg`.

    Raises:
        ConfigError: the folder is not a run, or the changes would make it another run.
    """
    if cfg.resume is None:
        return cfg if cfg.folder is None else resume_in_folder(cfg)
    folder = Path(str(cfg.resume))
    try:
        old = read_config(folder)
    except ConfigError as error:
        raise ConfigError(f"resume={error}") from error
    changes = [word for word in own_overrides() or [] if key_of(word) not in ("resume", "trust")]
    for word in changes:
        if key_of(word) in ("name", "output_dir", "folder"):
            raise ConfigError(f"{word}: output_dir, name and folder cannot be changed when resuming; leave it out")
    new = compose_changes(folder, old, changes, trust=bool(cfg.get("trust")))
    if found := forbidden_changes(old, new):
        raise ConfigError(format_changes(folder, found))
    check_hidden_secrets(folder, old, new)
    OmegaConf.update(new, "resume", str(folder))
    OmegaConf.update(new, "trust", cfg.get("trust") or False)  # false: the folder may come from somebody else
    return new


def resume_in_folder(cfg: DictConfig) -> DictConfig:
    """Return the config, with `resume` set if `folder` holds a run."""
    folder = Path(str(cfg.folder))
    if not (folder / "run.json").exists():
        return cfg
    if rank() > 0 and read_record(folder)["status"] != "finished":
        return cfg  # rank 0 decides, and may have just created the run
    old = read_config(folder)
    if found := [*forbidden_changes(old, cfg), *changed_data_paths(old, cfg)]:
        raise ConfigError(format_changes(folder, found, "folder"))
    OmegaConf.update(cfg, "resume", str(folder))
    return cfg


def is_finished(cfg: DictConfig) -> bool:
    """Return whether the run to resume has finished; if so, print its metrics."""
    if cfg.resume is None:
        return False
    record = read_record(Path(cfg.resume))
    if record["status"] == "finished":
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items() if value is not None)
        print(f"{cfg.resume}: this run has finished, nothing is left to do: {metrics}")
    return record["status"] == "finished"


def changed_data_paths(old: DictConfig, new: DictConfig) -> list[tuple[str, Any, Any]]:
    """Return the data paths that differ: the files there may not be those of a finished run."""
    before, after = flat(plain(old)), flat(plain(new))
    return [
        (key, before[key], after[key])
        for key in DATA_PATHS
        if key in before and key in after and not is_same_path(before[key], after[key])
    ]


def is_same_path(a: Any, b: Any) -> bool:
    """Return whether two paths, either of them None, are the same from the working directory."""
    return a == b or (a is not None and b is not None and Path(a).resolve() == Path(b).resolve())


VALUE_OVERRIDES = (OverrideType.CHANGE, OverrideType.FORCE_ADD)


def compose_changes(folder: Path, old: DictConfig, changes: list[str], *, trust: bool = False) -> DictConfig:
    """Return the config of a run with some overrides, composed with its own so that dependent values follow.

    A run from a program has no overrides; only single values that nothing depends on can be changed. Hydra is
    initialized with this project's configs.

    Args:
        folder: the run's folder.
        old: the run's config.
        changes: overrides of the command line.
        trust: also compose overrides of the run that read the environment or configure Hydra.

    Raises:
        ConfigError: the run is from a program, and an override is a choice or can change the result; or the overrides
            of the run read the environment or configure Hydra.
        HydraException: there is no such key or choice.
    """
    if not changes:
        return old
    own = read_record(folder)["overrides"]
    if own is not None:
        if not trust:
            check_overrides(folder, own)
        if any(key_of(word) == "logger" for word in changes):  # other loggers take other settings
            own = [word for word in own if not key_of(word).startswith("logger.")]
        return compose("train", [*own, *changes])
    new = old.copy()
    for override in OverridesParser.create().parse_overrides(changes):
        key, word = override.key_or_group, str(override.input_line)
        node = OmegaConf.select(old, key, default=old)  # a mapping is a group choice, or missing
        is_value = override.type in VALUE_OVERRIDES and not override.is_sweep_override()
        if not is_value or isinstance(node, DictConfig) or not without_effect(key):
            raise ConfigError(
                f"{word}: {folder} was made in a program, not by train.py, so only values of its config.yaml that "
                "cannot change the result can be changed (data.root=…, data.num_workers=4); leave the override out, "
                "or change it in the program"
            )
        OmegaConf.update(new, key, override.value(), merge=False)
    return new


def check_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Refuse overrides of run.json whose value depends on this machine: the folder may come from somebody else.

    Raises:
        ConfigError: names the override and the remedy.
    """
    for word in overrides:
        if re.search(r"\$\{[^}]*:", word) or word.lstrip("+~").startswith("hydra"):
            raise ConfigError(
                f"{folder}: {word} in its run.json would be evaluated here, where it may mean something else; leave "
                "the changes out, since its config.yaml has the values, or add trust=true (scripts: --trust)"
            )


def check_hidden_secrets(folder: Path, old: DictConfig, new: DictConfig) -> None:
    """Refuse to start a logger with a secret that config.yaml only has as ***.

    Raises:
        ConfigError: lists the keys to set again.
    """
    record = read_record(folder)
    if record["status"] == "finished":
        return
    before, after = flat(plain(old)), flat(plain(new))
    if missing := [key for key in record.get("hidden", []) if key in after and after[key] == before.get(key)]:
        again = " ".join(f"{key}=…" for key in missing)
        raise ConfigError(
            f"resume={folder}: a secret is hidden in config.yaml, which a logger needs; give it again, {again}, or "
            "resume without loggers, logger=csv"
        )


def forbidden_changes(old: DictConfig, new: DictConfig) -> list[tuple[str, Any, Any]]:
    """Return the differences that would make another run, with both values.

    A change in world size is allowed here; `Run` checks whether a norm would then see other batches.
    """
    return [found for found in result_differences(plain(old), plain(new)) if not affects_only_sharing(*found)]


def format_changes(folder: Path, found: Iterable[tuple[str, Any, Any]], key: str = "resume") -> str:
    """Describe the changes that would make another run."""
    lines = [f"{key}={folder}: it would become another run:"]
    lines += [f"  {key}: {old} in the run, {new} now" for key, old, new in found]
    return "\n".join([*lines, "  leave the change out, or begin a new run with it"])
