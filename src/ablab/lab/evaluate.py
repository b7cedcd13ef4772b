"""Evaluate the weights of a finished run on any split or shift, from its folder alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ablab.data.datamodule import DataModule
from ablab.errors import ConfigError
from ablab.lab.config.errors import menu
from ablab.lab.config.schema import check_config, is_guest
from ablab.lab.dry_run import CONF
from ablab.lab.launch.processes import lost_worker
from ablab.lab.run import provenance
from ablab.lab.run.checkpoint_files import BEST, BrokenFile, model_weights, newest_valid, read_weights, weights_problem
from ablab.lab.run.folder import read_config, read_environment, read_record, relpath
from ablab.lab.run.identity import plain
from ablab.lab.train import Parts, assemble, print_once, test

SKIPPED_CALLBACKS = ("checkpoints", "nonfinite", "samples")  # they write files or monitor training


def evaluate(
    folder: Path,
    *,
    split: Literal["train", "val", "test"] = "test",
    shift: str | None = None,
    severity: int | None = None,
    weights: Literal["best", "last"] = "best",
    trust: bool = False,
) -> dict[str, float]:
    """Evaluate the weights of a run, with as many threads as the run used; its folder does not change.

    Args:
        folder: the run's folder.
        split: the split to evaluate, every sample once, without augmentation; for the test split, the part that the
            run tested on (trainer.limit_test_batches).
        shift: a choice of conf/data/shift to apply to the inputs; None keeps the shift of the run.
        severity: of the shift, from 1 to 5.
        weights: the weights selected by validation, or those of the newest checkpoint.
        trust: build any class that the folder's config names, not only the expected kinds.

    Returns:
        The test metrics by name.

    Raises:
        ConfigError: the folder is not a run, lacks these weights, its data lack this shift, or have changed.
    """
    cfg = scoring_config(folder, split=split, shift=shift, severity=severity)
    parts = assemble_with_weights(folder, cfg, split=split, weights=weights, trust=trust)
    with lost_worker():
        found = test(parts, chosen=())
    if not found:
        raise ConfigError(f"{folder}: {type(parts.task).__name__} has no test_step, or there is no test_dataloader")
    return found


def assemble_with_weights(
    folder: Path,
    cfg: DictConfig,
    *,
    split: Literal["train", "val", "test"] = "test",
    weights: Literal["best", "last"] = "best",
    trust: bool = False,
) -> Parts:
    """Build the parts of a run from its config, and load its weights.

    Args:
        folder: the run's folder.
        cfg: the config from `scoring_config`.
        split, weights, trust: see `evaluate`.

    Raises:
        ConfigError: the folder is not a run, lacks these weights, or its data have changed.
    """
    cfg.trust = trust
    check_config(cfg, root=CONF / "train.yaml")
    record, environment = read_record(folder), read_environment(folder)
    match_threads(environment)
    for line in provenance.changes_since(record, environment, plain(read_config(folder))):
        print_once(f"not as it was: {line}")
    if is_guest(cfg) and split != "test":
        raise ConfigError(
            f"split={split}: {cfg.task._target_} brings its own loaders, and is tested on what its test_dataloader "
            "gives; leave --split out"
        )
    parts = assemble(cfg, scored=split)
    if isinstance(parts.data, DataModule) and parts.data.fingerprint != record["data"].get("fingerprint"):
        raise ConfigError(
            f"{folder}: the data are not those of the run (fingerprint {parts.data.fingerprint[:12]}, "
            f"{record['data']['fingerprint'][:12]} then); give the same files"
        )
    file, chosen = find_weights(folder, weights, parts.model.state_dict(), prefix="" if is_guest(cfg) else "model.")
    parts.model.load_state_dict(chosen)
    print_once(f"{weights} weights: {relpath(file)}")
    return parts


def match_threads(environment: dict[str, Any]) -> None:
    """Use as many threads as a run did: another number rounds differently."""
    then, now = environment["threads"]["torch"], torch.get_num_threads()
    if then != now:
        print_once(f"threads: {then}, as in the run, instead of {now}")
        torch.set_num_threads(then)


def scoring_config(
    folder: Path, *, split: str = "test", shift: str | None = None, severity: int | None = None
) -> DictConfig:
    """Return the config of a run for evaluation, without loggers, with another split or shift."""
    cfg = read_config(folder)
    cfg.logger = {}
    cfg.callbacks = {name: node for name, node in cfg.callbacks.items() if name not in SKIPPED_CALLBACKS}
    if split != "test":
        cfg.trainer.limit_test_batches = 1.0
    change_shift(cfg, shift, severity)
    return cfg


def change_shift(cfg: DictConfig, shift: str | None, severity: int | None) -> None:
    """Replace the shift, or its severity, in the config of a run."""
    if shift is not None:
        known = sorted(file.stem for file in (CONF / "data" / "shift").glob("*.yaml"))
        if shift not in known:
            raise ConfigError(f"shift={shift}: there is no such choice; {menu(shift, known, 'data/shift')}")
        OmegaConf.update(cfg, "data.shift", OmegaConf.load(CONF / "data" / "shift" / f"{shift}.yaml"), merge=False)
    if severity is not None:
        if "severity" not in (cfg.data.get("shift") or {}):
            raise ConfigError(f"severity={severity}: of which shift? give one, --shift contrast for example")
        cfg.data.shift.severity = severity


def describe_shift(cfg: DictConfig) -> str:
    """Return the shift of a config and its severity, as on the command line."""
    node = cfg.data.get("shift")
    if node is None:
        return "none"
    name = node._target_
    for file in (CONF / "data" / "shift").glob("*.yaml"):
        choice: Any = OmegaConf.load(file)
        if choice._target_ == node._target_:
            name = file.stem
    return f"{name}, severity {node.severity}" if "severity" in node else name


def find_weights(
    folder: Path, which: str, like: dict[str, Tensor], prefix: str = "model."
) -> tuple[Path, dict[str, Tensor]]:
    """Return the best or last weights of a run, and the file that holds them.

    Args:
        folder: the run's folder.
        which: "best" or "last".
        like: the weights of the model to load them into.

    Raises:
        ConfigError: no weights exist, or none can be read and fit the model.
    """
    if which == "last":

        def check(path: Path, state: dict[str, Any]) -> None:
            if (problem := weights_problem(model_weights(state, prefix), like)) is not None:
                raise ValueError(problem)

        found = newest_valid(
            folder / "checkpoints", lambda text: print_once(f"warning: {text}", file=sys.stderr), check=check
        )
        if found is None:
            raise ConfigError(f"{folder}: there is no sound checkpoint in it")
        return found[0], model_weights(found[1], prefix)
    path = folder / "checkpoints" / BEST
    if not path.exists():
        raise ConfigError(f"{path}: there is none, the run has not validated; the last weights may do (--weights last)")
    try:
        weights = read_weights(path)
    except BrokenFile as error:
        raise ConfigError(f"{error}; the last weights may do (--weights last)") from error
    if (problem := weights_problem(weights, like)) is not None:
        raise ConfigError(f"{path}: its weights are not of the model that the code now makes ({problem})")
    return path, weights
