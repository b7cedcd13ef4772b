"""`resume=FOLDER`: the config that a run had, and no other."""

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
from ablab.lab.run.folder import config_of, read_record
from ablab.lab.run.identity import PLACES, differences, flat, only_sharing, plain, without_effect
from ablab.rank import rank


def words_for_hydra(argv: Sequence[str]) -> list[str]:
    """Return the command line that Hydra composes: without the overrides beside `resume=`.

    Hydra composes them against the default config, which lacks the keys of other data, models and loggers; `resumed`
    composes them on the overrides of the run itself. Where Hydra only shows a config, it is given the run's, too.

    Raises:
        ConfigError: `resume=` in a sweep.
    """
    argv = with_open_keys(argv)
    if (folder := run_to_resume(argv)) is None:
        return list(argv)
    flags = {word.partition("=")[0] for word in argv if word.startswith("-")}
    if flags & {"-m", "--multirun"}:
        raise names_one_run(f"resume={folder}")
    if flags & {"-c", "--cfg", "-i", "--info"}:
        own = read_record(folder)["overrides"] if (folder / "run.json").exists() else None
        check_overrides(folder, own or [])
        first = min(i for i, word in enumerate(argv) if i and is_override(word))
        return [*argv[:first], *(own or []), *argv[first:]]
    changes = overrides_beside_resume(argv)
    return [word for word in argv if word not in changes]


def with_open_keys(words: Sequence[str]) -> list[str]:
    """Let overrides of `task.` and `data.` add keys, where these name somebody else's class: `task=lightning`.

    Hydra refuses a key that no YAML has; which keys a class takes is checked against its signature all the same.
    """
    is_open = {word.partition("=")[0] for word in words if word in ("task=lightning", "data=lightning")}
    return [
        f"++{word}" if word.partition(".")[0] in is_open and "=" in word and "." in word.partition("=")[0] else word
        for word in words
    ]


def names_one_run(word: str) -> ConfigError:
    """Return the error for an override of a sweep that names the folder of one run."""
    return ConfigError(
        f"{word}: each run of a sweep has its own folder, and the same command goes on with those that are not done; "
        "leave it out"
    )


def run_to_resume(argv: Sequence[str]) -> Path | None:
    """Return the folder that a command line resumes; None if it begins a run, or Hydra is to refuse it."""
    with suppress(HydraException):
        words = [word for word in argv[1:] if is_override(word) and key_of(word) == "resume"]
        values = [override.value() for override in OverridesParser.create().parse_overrides(words)]
        if values and values[-1] is not None:
            return Path(values[-1].text if isinstance(values[-1], QuotedString) else str(values[-1]))
    return None


def is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def overrides_beside_resume(argv: Sequence[str]) -> list[str]:
    """Return the overrides of a command line that names a run to resume; none of any other."""
    if run_to_resume(argv) is None:
        return []
    for_hydra = r"(resume|trust|hydra)([=./@]|$)"
    return [word for word in argv[1:] if is_override(word) and not re.match(for_hydra, word.lstrip("+~"))]


def key_of(word: str) -> str:
    """Return what an override sets."""
    return word.partition("=")[0].lstrip("+~")


def own_overrides() -> list[str] | None:
    """Return the overrides of the command line; None in a program that composed the config itself."""
    if not HydraConfig.initialized():
        return None
    words = list(HydraConfig.get().overrides.task)
    resumes = any(key_of(word) == "resume" for word in words)
    return [*words, *(word for word in overrides_beside_resume(sys.argv) if resumes and word not in words)]


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
    changes = [word for word in own_overrides() or [] if key_of(word) not in ("resume", "trust")]
    for word in changes:
        if key_of(word) in ("name", "output_dir", "folder"):
            raise ConfigError(f"{word}: output_dir, name and folder cannot be changed when resuming; leave it out")
    new = changed(folder, old, changes, trust=bool(cfg.get("trust")))
    if found := forbidden(old, new):
        raise ConfigError(report(folder, found))
    check_hidden(folder, old, new)
    OmegaConf.update(new, "resume", str(folder))
    OmegaConf.update(new, "trust", cfg.get("trust") or False)  # false: the folder may be somebody else's
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


VALUES = (OverrideType.CHANGE, OverrideType.FORCE_ADD)


def changed(folder: Path, old: DictConfig, changes: list[str], *, trust: bool = False) -> DictConfig:
    """Return the config of a run with some overrides: composed on the run's own, so that what depends on them follows.

    A run that was made in a program has no overrides; of its config, single values can be changed on which nothing
    depends. Hydra is initialized with this project's configs.

    Args:
        folder: the run's.
        old: the run's config.
        changes: overrides of the command line.
        trust: compose overrides of the run that read the environment or set up Hydra, too.

    Raises:
        ConfigError: the run was made in a program, and an override is a choice or can change the result; or the run's
            own overrides read the environment or set up Hydra.
        HydraException: there is no such key or choice.
    """
    if not changes:
        return old
    own = read_record(folder)["overrides"]
    if own is not None:
        if not trust:
            check_overrides(folder, own)
        if any(key_of(word) == "logger" for word in changes):  # other loggers have other settings
            own = [word for word in own if not key_of(word).startswith("logger.")]
        return compose("train", [*own, *changes])
    new = old.copy()
    for override in OverridesParser.create().parse_overrides(changes):
        key, word = override.key_or_group, str(override.input_line)
        node = OmegaConf.select(old, key, default=old)  # a mapping is a choice, or not there
        is_value = override.type in VALUES and not override.is_sweep_override()
        if not is_value or isinstance(node, DictConfig) or not without_effect(key):
            raise ConfigError(
                f"{word}: {folder} was made in a program, not by train.py, so only values of its config.yaml that "
                "cannot change the result can be changed (data.root=…, data.num_workers=4); leave the override out, "
                "or change it in the program"
            )
        OmegaConf.update(new, key, override.value(), merge=False)
    return new


def check_overrides(folder: Path, words: Sequence[str]) -> None:
    """Refuse to compose overrides of run.json that mean something else here: the folder may be somebody else's.

    Raises:
        ConfigError: names the override and the remedy.
    """
    for word in words:
        if re.search(r"\$\{[^}]*:", word) or word.lstrip("+~").startswith("hydra"):
            raise ConfigError(
                f"{folder}: {word} in its run.json would be evaluated here, where it may mean something else; leave "
                "the changes out, since its config.yaml has the values, or add trust=true (scripts: --trust)"
            )


def check_hidden(folder: Path, old: DictConfig, new: DictConfig) -> None:
    """Refuse to start a logger with a secret that config.yaml only has as ***.

    Raises:
        ConfigError: with the keys that have to be given again.
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
