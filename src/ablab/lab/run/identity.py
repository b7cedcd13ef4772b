"""What can change a run's result, and what cannot: a run's identity, and the difference between two configs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

PLACES = ("data.root", "data.path", "data.train_file", "data.test_file")  # of the data

# Keys that say where, when and how comfortably a run is done, not what it finds. The data's place is no part of the
# data, which have a fingerprint. A fork adds its own.
WITHOUT_EFFECT = (
    "name",
    "output_dir",
    "folder",
    "resume",
    "quiet",
    "dry_run",
    "trust",
    "ablation.*",
    "cell.*",
    "logger.*",
    "callbacks.progress.*",
    "callbacks.samples.*",
    "callbacks.checkpoints.keep",
    "callbacks.checkpoints.every_*",
    "data.num_workers",
    *PLACES,
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.profile",
    "trainer.max_restarts",
    "trainer.strategy.timeout",
)

# Values under `trainer` that decide how many processes share a batch and how they add up, not what a step learns from:
# a run is gone on with on other processes if all that differs is among them. Other strategies store another state.
SHARING: dict[str, tuple[Any, ...]] = {
    "strategy": ("auto", "ddp"),
    "strategy._target_": ("ablab.lab.launch.strategies.ddp",),
    "strategy.compression": (None,),
}
ROUNDING = (
    "devices",
    "num_nodes",
    *(f"strategy.{name}" for name in ("bucket_cap_mb", "static_graph", "find_unused_parameters", "fixed_buckets")),
)


def identity(config: Mapping[str, Any], *, code: str, data: str, processes: int = 1) -> dict[str, str]:
    """Hashes of all that can change a run's result; equal ones mean equal results, up to the machine's rounding.

    Args:
        config: the resolved config.
        code: a hash of the code.
        data: the data's fingerprint.
        processes: how many there are, which the config may leave to the machine.
    """
    values = json.dumps(scientific(config), sort_keys=True)
    parts = {"config": hashlib.sha256(values.encode()).hexdigest()[:16], "code": code[:16], "data": data[:16]}
    every = json.dumps({**parts, "processes": processes})
    return {"run": hashlib.sha256(every.encode()).hexdigest()[:16], **parts}


def scientific(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that can change a result, by their full keys."""
    return {key: value for key, value in flat(config).items() if not without_effect(key)}


@cache
def without_effect(key: str) -> bool:
    return any(fnmatch(key, pattern) or fnmatch(f"{key}.", pattern) for pattern in WITHOUT_EFFECT)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys that can change a result and differ, each with both values; "(none)" where there is no such key."""
    before, after = scientific(old), scientific(new)
    keys = sorted(before.keys() | after.keys())
    pairs = [(key, before.get(key, "(none)"), after.get(key, "(none)")) for key in keys]
    return [(key, a, b) for key, a, b in pairs if a != b]


def only_sharing(key: str, *values: Any) -> bool:
    """Whether a key with these values, "(none)" among them, decides no more than how processes share the work."""
    name = key.removeprefix("trainer.")
    fine = (*SHARING.get(name, ()), "(none)")
    return key != name and (name in ROUNDING or (name in SHARING and all(value in fine for value in values)))


def flat(config: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists, by their full keys."""
    if isinstance(config, Mapping) and config:
        children = list(config.items())
    elif isinstance(config, list) and config:
        children = list(enumerate(config))
    else:
        return {key: config}
    return {k: v for name, child in children for k, v in flat(child, f"{key}.{name}" if key else str(name)).items()}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain data."""
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return container
