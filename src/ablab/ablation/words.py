"""From the words of a command line to the ablation that they ask for."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig, OmegaConf

from ablab.ablation.ablation import Ablation, Words
from ablab.config.build import blame
from ablab.config.errors import ConfigError, menu
from ablab.config.schema import show

Levels = dict[str, list[str]]  # the words of each level


def asked_for(words: Words, cfg: DictConfig) -> tuple[Ablation, Words]:
    """The ablation that a command asks for.

    Words of a factor narrow or widen its levels, `seed=0,1,2` the seeds; another word with several values is a factor
    more. Without an ablation's file the words alone make the grid, and the first level of each factor is the baseline.

    Args:
        words: of the command line.
        cfg: what is composed of those with one value.

    Returns:
        The ablation, and the words that are common to all of its runs.

    Raises:
        ConfigError: a grid that cannot be.
    """
    given: dict[str, Any] = {}
    if cfg.ablation is not None:
        container: Any = OmegaConf.to_container(cfg.ablation, resolve=True)
        given = {key: value for key, value in container.items() if key != "_target_"}
    factors, seeds, common = dict(given.get("factors", {})), given.get("seeds", [cfg.seed]), []
    for override in OverridesParser.create().parse_overrides(words):
        name = override.get_key_element().lstrip("+~")
        if name == "seed" and (override.is_sweep_override() or "seeds" in given):
            seeds = [int(level) for level in levels(override)]
        elif isinstance(factors.get(name), dict):
            factors[name] = narrowed(name, factors[name], levels(override))
        elif name in factors or override.is_sweep_override():
            factors[name] = levels(override)
        else:
            common.append(str(override.input_line))
    if not given:
        given = {
            "name": cfg.name if cfg.name != "run" else "_".join(["sweep", *map(short, factors)]),
            "baseline": {factor: next(iter(of)) for factor, of in factors.items()},
            "metrics": [f"test/{str(cfg.monitor.metric).rpartition('/')[2]}"],
        }
    with blame("ablation"):
        return Ablation(**{**given, "factors": factors, "seeds": seeds}), common


def levels(override: Override) -> Levels:
    """Each value of a word, as it is called, and the word that has it alone."""
    if not override.is_sweep_override():
        return {text(override.value()): [str(override.input_line)]}
    key = str(override.input_line).partition("=")[0]
    values = list(override.sweep_iterator())
    words = [f"{key}={value}" for value in override.sweep_string_iterator()]
    found = {text(value): [word] for value, word in zip(values, words, strict=True)}
    if len(found) < len(values):
        raise ConfigError(f"{override.input_line}: a value is there twice")
    return found


def narrowed(name: str, whole: dict[str, Any], wanted: Levels) -> dict[str, Any]:
    """Some of the levels of a factor whose levels have names."""
    named = {show(level): words for level, words in whole.items()}
    for level in wanted:
        if level not in named:
            raise ConfigError(f"{name}={level}: there is no such level; {menu(level, [*named], name)}")
    return {level: named[level] for level in wanted}


def text(value: Any) -> str:
    """A value as it is called."""
    return value.text if isinstance(value, QuotedString) else show(value)


def short(factor: str) -> str:
    """The last part of a factor's key."""
    return factor.rpartition(".")[2].rpartition("/")[2]
