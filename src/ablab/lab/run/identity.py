"""The identity of a run: the settings that can change its result, and how two configs differ in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

DATA_PATHS = ("data.root", "data.path", "data.train_file", "data.test_file")

# Settings that do not affect results. Data paths are among them, since the data have a fingerprint. A fork adds its
# own.
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
    *DATA_PATHS,
    "trainer.log_every_n_steps",
    "trainer.enable_*",
    "trainer.profile",
    "trainer.max_restarts",
    "trainer.strategy.timeout",
)

# Values under `trainer` that affect how many processes share a batch and the order of sums, but not the data of a step.
# A run can be resumed with another world size if only these differ. Other strategies store other checkpoints.
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
    """Return hashes of everything that can change a result; equal hashes mean equal results, up to rounding.

    Args:
        config: the resolved config.
        code: a hash of the code.
        data: the fingerprint of the data.
        processes: the world size, which the config may leave to the machine.
    """
    values = json.dumps(scientific(config), sort_keys=True)
    parts = {"config": hashlib.sha256(values.encode()).hexdigest()[:16], "code": code[:16], "data": data[:16]}
    every = json.dumps({**parts, "processes": processes})
    return {"run": hashlib.sha256(every.encode()).hexdigest()[:16], **parts}


def scientific(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that can change a result, by their full keys."""
    return {key: value for key, value in flat(config).items() if not without_effect(key)}


@cache
def without_effect(key: str) -> bool:
    return any(fnmatch(key, pattern) or fnmatch(f"{key}.", pattern) for pattern in WITHOUT_EFFECT)


def result_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the keys that can change a result and differ, with both values; "(none)" for a missing key."""
    before, after = scientific(old), scientific(new)
    keys = sorted(before.keys() | after.keys())
    pairs = [(key, before.get(key, "(none)"), after.get(key, "(none)")) for key in keys]
    return [(key, a, b) for key, a, b in pairs if a != b]


def affects_only_sharing(key: str, *values: Any) -> bool:
    """Return whether a key with these values only affects how processes share the work; "(none)" is a missing key."""
    name = key.removeprefix("trainer.")
    fine = (*SHARING.get(name, ()), "(none)")
    return key != name and (name in ROUNDING or (name in SHARING and all(value in fine for value in values)))


def flat(config: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists, by their full keys."""
    if isinstance(config, Mapping) and config:
        children = list(config.items())
    elif isinstance(config, list) and config:
        children = list(enumerate(config))
    else:
        return {key: config}
    return {k: v for name, child in children for k, v in flat(child, f"{key}.{name}" if key else str(name)).items()}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved config as plain data."""
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return container
