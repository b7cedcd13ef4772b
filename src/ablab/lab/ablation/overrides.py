"""Parse the overrides of a command line into the ablation that they describe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig, OmegaConf

from ablab.errors import ConfigError
from ablab.lab.ablation.ablation import Ablation, Overrides
from ablab.lab.config.build import add_config_path
from ablab.lab.config.errors import menu
from ablab.lab.config.schema import is_guest, show
from ablab.lab.run.folder import LONGEST_NAME, check_name
from ablab.lab.run.identity import without_effect
from ablab.lab.run.resume import key_of, single_run_error

Levels = dict[str, list[str]]  # the overrides of each level


def parse_ablation(overrides: Overrides, cfg: DictConfig) -> tuple[Ablation, Overrides]:
    """Return the ablation that a command describes.

    Overrides of a factor replace its levels, `seed=0,1,2` the seeds; another override with several values adds a
    factor. Without an ablation's file, the overrides alone define the grid, and the first level of each factor is the
    baseline.

    Args:
        overrides: the overrides of the command line.
        cfg: composed from the overrides with a single value.

    Returns:
        The ablation, and the overrides common to all of its runs.

    Raises:
        ConfigError: the grid is invalid.
    """
    given: dict[str, Any] = {}
    if cfg.ablation is not None:
        container: Any = OmegaConf.to_container(cfg.ablation, resolve=True)
        given = {key: value for key, value in container.items() if key != "_target_"}
    factors, seeds, common = dict(given.get("factors", {})), given.get("seeds", [cfg.seed]), []
    added: dict[str, str] = {}  # overrides of keys that are no factors of a file
    for override in OverridesParser.create().parse_overrides(overrides):
        name = key_of(str(override.input_line))
        check_allowed_in_sweep(name, override)
        if name not in factors:
            added[name] = str(override.input_line)
        if name == "seed" and (override.is_sweep_override() or "seeds" in given):
            seeds = [parse_seed(level, override) for level in parse_levels(override)]
        elif isinstance(factors.get(name), dict):
            factors[name] = select_levels(name, factors[name], parse_levels(override))
        elif name in factors or override.is_sweep_override():
            factors[name] = parse_levels(override)
        else:
            common.append(str(override.input_line))
    if not given:
        check_name("name", str(cfg.name))
        given = {
            "name": cfg.name if cfg.name != "run" else default_name(factors, common),
            "baseline": {factor: next(iter(of)) for factor, of in factors.items()},
            "metrics": [default_metric(cfg)],
        }
    elif "name" in added:
        raise ConfigError(f"{added['name']}: an ablation's file names its folder; give ablation.{added['name']}")
    with add_config_path("ablation"):
        ablation = Ablation(**{**given, "factors": factors, "seeds": seeds})
    ablation.from_overrides = cfg.ablation is None
    for name, word in added.items():
        check_no_conflict(name, word, ablation)
    return ablation, common


def default_metric(cfg: DictConfig) -> str:
    """Return the metric that a sweep without a file compares: the test metric that corresponds to `monitor.metric`.

    Raises:
        ConfigError: an external LightningModule, and no metric is set.
    """
    if not is_guest(cfg):
        return f"test/{str(cfg.monitor.metric).rpartition('/')[2]}"
    if cfg.monitor.metric is None:
        raise ConfigError("monitor.metric=null: a sweep compares runs by a metric; set it to one that the module logs")
    return str(cfg.monitor.metric)


def check_allowed_in_sweep(name: str, override: Override) -> None:
    """Refuse an override that only makes sense for a single run.

    Raises:
        ConfigError: names the remedy.
    """
    if name in ("name", "output_dir") and override.is_sweep_override():
        raise ConfigError(f"{override.input_line}: all runs of a sweep are in one folder; give one value")
    if name in ("resume", "folder"):
        raise single_run_error(str(override.input_line))


def default_name(factors: Iterable[str], common: Overrides) -> str:
    """Name a sweep after its factors, with a hash of the common settings that can change a result.

    Two sweeps of one factor with different settings get two folders: `-m norm=a,b` and `-m norm=a,b model=rnn`.
    """
    found = effective_overrides(common)
    suffix = f"_{short_hash(sorted(found.items()))}" if found else ""
    stem = "_".join(["sweep", *map(last_part, factors)])
    if len((stem + suffix).encode()) > LONGEST_NAME:
        stem = f"sweep_{len(list(factors))}_factors_{short_hash(stem)}"
    return stem + suffix


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:6]


def effective_overrides(common: Overrides) -> dict[str, str]:
    """Return the overrides that can change a result, by key; except the seed, which differs between runs."""
    pairs = [word.lstrip("+").partition("=")[::2] for word in common]
    return {
        key: value
        for key, value in pairs
        if key != "seed" and not key.startswith("hydra") and not without_effect(key.lstrip("~"))
    }


def check_no_conflict(name: str, word: str, ablation: Ablation) -> None:
    """Refuse an override that conflicts with a level or the tuned key of the ablation.

    Raises:
        ConfigError: names the levels that set the same key.
    """
    remedy = f"leave it out, or change the ablation's file, conf/ablation/{ablation.name}.yaml"
    if ablation.tune is not None and name == ablation.tune.key:
        raise ConfigError(f"{word}: {name} is what ablation.tune chooses for each cell; {remedy}")
    for factor, of in ablation.levels.items():
        setting = [level for level, overrides in of.items() if name != factor and name in map(key_of, overrides)]
        if setting:
            raise ConfigError(f"{word}: {factor}={','.join(setting)} set {name}, too; {remedy}")


def parse_seed(level: str, override: Override) -> int:
    try:
        return int(level)
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: a seed is a whole number, seed=0,1,2 or seed=range(5)") from error


def parse_levels(override: Override) -> Levels:
    """Return the values of an override as levels, each with its own override."""
    if not override.is_sweep_override():
        return {value_text(override.value()): [str(override.input_line)]}
    key = str(override.input_line).partition("=")[0]
    values = list(override.sweep_iterator())
    overrides = [f"{key}={value}" for value in override.sweep_string_iterator()]
    found = {value_text(value): [word] for value, word in zip(values, overrides, strict=True)}
    if len(found) < len(values):
        raise ConfigError(f"{override.input_line}: a value is there twice")
    return found


def select_levels(name: str, every: dict[str, Any], wanted: Levels) -> dict[str, Any]:
    """Return some of the levels of a factor with named levels."""
    named = {show(level): overrides for level, overrides in every.items()}
    for level in wanted:
        if level not in named:
            raise ConfigError(f"{name}={level}: there is no such level; {menu(level, [*named], name)}")
    return {level: named[level] for level in wanted}


def value_text(value: Any) -> str:
    """Return the text of a value."""
    return value.text if isinstance(value, QuotedString) else show(value)


def last_part(factor: str) -> str:
    """Return the last part of a factor's key."""
    return factor.rpartition(".")[2].rpartition("/")[2]
