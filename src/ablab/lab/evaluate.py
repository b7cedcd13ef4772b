"""A run's weights scored again, on any split or shift, from the run's folder alone."""

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
from ablab.lab.config.schema import check, is_guest
from ablab.lab.dry_run import CONF
from ablab.lab.launch.processes import lost_worker
from ablab.lab.run import provenance
from ablab.lab.run.checkpoint_files import BEST, BrokenFile, model_weights, newest_sound, read_weights, weights_problem
from ablab.lab.run.folder import config_of, read_environment, read_record, short
from ablab.lab.run.identity import plain
from ablab.lab.train import Parts, assemble, say, test

NOT_FOR_SCORING = ("checkpoints", "nonfinite", "samples")  # callbacks that write, or watch a training


def evaluate(
    folder: Path,
    *,
    split: Literal["train", "val", "test"] = "test",
    shift: str | None = None,
    severity: int | None = None,
    weights: Literal["best", "last"] = "best",
    trust: bool = False,
) -> dict[str, float]:
    """Score a run's weights, on as many threads as it had; nothing in its folder changes.

    Args:
        folder: the run's.
        split: what to score on, every sample once, without augmentation; of the test split, what the run tested on
            (trainer.limit_test_batches).
        shift: what is done to the inputs, a choice of conf/data/shift; None is what the run's test had.
        severity: of the shift, from 1 to 5.
        weights: those that validation chose, or those of the newest checkpoint.
        trust: build whatever the folder's config names, not only the kinds of objects that a run is made of.

    Returns:
        the metrics of a test, by their names there.

    Raises:
        ConfigError: the folder is no run's, has no such weights, its data have no such shift, or are others now.
    """
    cfg = scoring(folder, split=split, shift=shift, severity=severity)
    parts = with_weights(folder, cfg, split=split, weights=weights, trust=trust)
    with lost_worker():
        found = test(parts, chosen=())
    if not found:
        raise ConfigError(f"{folder}: {type(parts.task).__name__} has no test_step, or there is no test_dataloader")
    return found


def with_weights(
    folder: Path,
    cfg: DictConfig,
    *,
    split: Literal["train", "val", "test"] = "test",
    weights: Literal["best", "last"] = "best",
    trust: bool = False,
) -> Parts:
    """Build what a run's config describes, and load the run's weights.

    Args:
        folder: the run's.
        cfg: the run's config, for scoring.
        split, weights, trust: see `evaluate`.

    Raises:
        ConfigError: the folder is no run's, has no such weights, or its data are others now.
    """
    cfg.trust = trust
    check(cfg, root=CONF / "train.yaml")
    record, environment = read_record(folder), read_environment(folder)
    take_threads(environment)
    for line in provenance.changes_since(record, environment, plain(config_of(folder))):
        say(f"not as it was: {line}")
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
    file, chosen = weights_of(folder, weights, parts.model.state_dict(), prefix="" if is_guest(cfg) else "model.")
    parts.model.load_state_dict(chosen)
    say(f"{weights} weights: {short(file)}")
    return parts


def take_threads(environment: dict[str, Any]) -> None:
    """Compute with as many threads as a run did: another number rounds otherwise."""
    then, now = environment["threads"]["torch"], torch.get_num_threads()
    if then != now:
        say(f"threads: {then}, as in the run, instead of {now}")
        torch.set_num_threads(then)


def scoring(folder: Path, *, split: str = "test", shift: str | None = None, severity: int | None = None) -> DictConfig:
    """A run's config, for scoring: without what writes, with another shift, and the whole of another split."""
    cfg = config_of(folder)
    cfg.logger = {}
    cfg.callbacks = {name: node for name, node in cfg.callbacks.items() if name not in NOT_FOR_SCORING}
    if split != "test":
        cfg.trainer.limit_test_batches = 1.0
    change_shift(cfg, shift, severity)
    return cfg


def change_shift(cfg: DictConfig, shift: str | None, severity: int | None) -> None:
    """Put another shift into a run's config."""
    if shift is not None:
        known = sorted(file.stem for file in (CONF / "data" / "shift").glob("*.yaml"))
        if shift not in known:
            raise ConfigError(f"shift={shift}: there is no such choice; {menu(shift, known, 'data/shift')}")
        OmegaConf.update(cfg, "data.shift", OmegaConf.load(CONF / "data" / "shift" / f"{shift}.yaml"), merge=False)
    if severity is not None:
        if "severity" not in (cfg.data.get("shift") or {}):
            raise ConfigError(f"severity={severity}: of which shift? give one, --shift contrast for example")
        cfg.data.shift.severity = severity


def shift_of(cfg: DictConfig) -> str:
    """The shift of a config and its severity, in the words of the command line."""
    node = cfg.data.get("shift")
    if node is None:
        return "none"
    name = node._target_
    for file in (CONF / "data" / "shift").glob("*.yaml"):
        choice: Any = OmegaConf.load(file)
        if choice._target_ == node._target_:
            name = file.stem
    return f"{name}, severity {node.severity}" if "severity" in node else name


def weights_of(
    folder: Path, which: str, like: dict[str, Tensor], prefix: str = "model."
) -> tuple[Path, dict[str, Tensor]]:
    """The weights that a run has kept, and the file that holds them.

    Args:
        folder: the run's.
        which: "best" or "last".
        like: the weights of the model that is to have them.

    Raises:
        ConfigError: there are none, or none that can be read and fit the model.
    """
    if which == "last":

        def check(path: Path, state: dict[str, Any]) -> None:
            if (problem := weights_problem(model_weights(state, prefix), like)) is not None:
                raise ValueError(problem)

        found = newest_sound(folder / "checkpoints", lambda text: say(f"warning: {text}", file=sys.stderr), check=check)
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
