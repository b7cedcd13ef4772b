"""The runs of an ablation, each with its config and its folder."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from ablab.ablation import metrics
from ablab.ablation.ablation import Ablation, Planned, Words
from ablab.ablation.results import put, status_of
from ablab.ablation.words import short
from ablab.config.errors import CONF, ConfigError
from ablab.config.schema import check, quoted
from ablab.data.reading import what_is_read
from ablab.digest import digest
from ablab.runs.folder import ABLATION, read_record
from ablab.runs.folder import short as short_path
from ablab.runs.identity import identity, plain
from ablab.runs.provenance import code_hash
from ablab.waiting import counted

Compose = Callable[[Words], DictConfig]
DONE = ("finished", "diverged")  # run again, they would end the same


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that can be started.

    Args:
        plan: its place in the grid.
        cfg: its whole config.
        hydra: what Hydra knows of it, its words among it.
        metrics: what it is to have logged.
        folder: where it is, begun or not; named by the plan, and by the config and the code that decide its result.
    """

    plan: Planned
    cfg: DictConfig = field(repr=False)
    hydra: DictConfig = field(repr=False)
    folder: Path
    metrics: list[str] = field(repr=False)

    @property
    def words(self) -> Words:
        """The command line that makes the same run."""
        return list(self.hydra.hydra.overrides.task)

    @property
    def entry(self) -> dict[str, Any]:
        """What finds it again."""
        return {"folder": self.folder.name, "cell": self.plan.cell, "seed": self.plan.seed}

    @property
    def status(self) -> str:
        return status_of(self.folder)

    @property
    def done(self) -> bool:
        return self.status in DONE


class Grid:
    """Composes each cell once, and gives every run its folder.

    Args:
        ablation: the grid as data.
        common: words that all runs have.
        compose: from words to a config.
        output_dir: where the ablation's folder is.
        elsewhere: the runs take place on other machines, which have what this one may lack.
    """

    def __init__(
        self, ablation: Ablation, common: Words, compose: Compose, output_dir: Path, *, elsewhere: bool = False
    ) -> None:
        self.ablation = ablation
        self.common = common
        self.elsewhere = elsewhere
        self.compose = compose
        self.folder = (output_dir / ablation.name).absolute()
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.code = code_hash()
        self.fingerprints: dict[str, str] = {}  # of the data, by their config

    def prepared(self, plan: Planned) -> Prepared:
        """A run with its config and folder."""
        cfg = copy.deepcopy(self.config(plan))
        hydra = OmegaConf.masked_copy(cfg, "hydra")
        with open_dict(cfg):
            del cfg["hydra"]
        cfg.seed = plan.seed
        cfg.name = self.ablation.name
        with open_dict(cfg):
            cfg.cell = dict(plan.cell)
        added = [
            f"seed={plan.seed}",
            f"name={self.ablation.name}",
            "cell={{{}}}".format(",".join(f"{k}:{quoted(v)}" for k, v in plan.cell.items())),
        ]
        if cfg.logger.get("wandb") is not None:
            tags = [*cfg.logger.wandb.tags, *(tag(factor, level) for factor, level in plan.cell.items())]
            cfg.logger.wandb.group = cfg.logger.wandb.group or self.ablation.name
            cfg.logger.wandb.tags = tags
            added += [f"logger.wandb.group={quoted(cfg.logger.wandb.group)}", f"logger.wandb.tags={quoted(tags)}"]
        content: Any = OmegaConf.to_container(cfg, resolve=True)
        known = identity(content, code=self.code, data="")
        folder = self.folder / f"{folder_name(plan)}_{known['run'][:8]}"
        if self.ablation.mix_code and status_of(folder) not in DONE:
            folder = self.same_config(known["config"]) or folder
        cfg.folder = str(folder)
        with read_write(hydra), open_dict(hydra):
            hydra.hydra.mode = RunMode.MULTIRUN
            hydra.hydra.overrides.task = [*self.common, *plan.words, *added, f"folder={quoted(str(folder))}"]
        return Prepared(plan, cfg, hydra, folder, self.ablation.metrics)

    def config(self, plan: Planned) -> DictConfig:
        """The config of a run but for its seed, composed once for all seeds: the longest part of preparing one."""
        if plan.words not in self.composed:
            self.composed[plan.words] = self.compose([*self.common, *plan.words])
        return self.composed[plan.words]

    def same_config(self, config: str) -> Path | None:
        """The newest finished run of this config, whatever its code was."""
        found = [folder for folder, record in self.records if record["identity"]["config"] == config]
        return max(found, key=lambda folder: (folder / "run.json").stat().st_mtime, default=None)

    @cached_property
    def records(self) -> list[tuple[Path, dict[str, Any]]]:
        """Every run that was done before this grid began any, with its record."""
        records = [(file.parent, read_record(file.parent)) for file in sorted(self.folder.glob("*/run.json"))]
        return [(folder, record) for folder, record in records if record["status"] in DONE]

    def prepared_all(self, plans: Iterable[Planned]) -> list[Prepared]:
        """Runs with their configs, once each of them has been found to be possible."""
        plans = list(plans)
        with closing(counted(plans, len(plans), "composing the configs")) as told:
            runs = [self.prepared(plan) for plan in told]
        self.check(runs)
        return runs

    def check(self, runs: list[Prepared]) -> None:
        """Refuse what cannot be run, for every cell, before any is.

        Raises:
            ConfigError: with a line or more for each cell.
        """
        from ablab.train import tried

        seen: set[tuple[str, ...]] = set()
        found: dict[str, list[str]] = {}
        with closing(counted(runs, len(runs), "trying each cell without memory")) as told:
            for run in told:
                if run.plan.words in seen:
                    continue
                seen.add(run.plan.words)
                try:
                    check(run.cfg, CONF / "train.yaml")
                    metrics.check(self.ablation.metrics, run.cfg)
                    if not run.done:
                        HydraConfig.instance().set_config(run.hydra)
                        data, _, _ = tried(without_accelerator(run.cfg) if self.elsewhere else run.cfg)
                        self.fingerprints[what_is_read(plain(run.cfg.data))] = data.fingerprint
                except ConfigError as error:
                    found.setdefault(str(error), []).append(run.plan.cell_label)
        if found:
            lines = [f"{message}\n  in {shown(cells)}" for message, cells in found.items()]
            raise ConfigError("\n".join([*lines, "nothing has been run; ablation.exclude leaves cells out"]))
        if not self.elsewhere:
            for run in runs:
                self.check_data(run)

    def check_data(self, run: Prepared) -> None:
        """Refuse to take a run for one of today's data that began with others: where the files are is not in its name.

        Raises:
            ConfigError: with both fingerprints.
        """
        if not (run.folder / "run.json").exists():
            return
        then = read_record(run.folder).get("data", {}).get("fingerprint")
        now = self.fingerprint(run)
        if then not in (None, now):
            name = "name" if run.cfg.ablation is None else "ablation.name"
            raise ConfigError(
                f"data: {short_path(run.folder)} began with other data (fingerprint {then[:12]}) than these "
                f"({now[:12]}); give the files of then, or the ablation another name, {name}=…; nothing has been run"
            )

    def fingerprint(self, run: Prepared) -> str:
        """Of a run's data; they are read once for all runs with the same ones."""
        from ablab.train import data_of

        key = what_is_read(plain(run.cfg.data))
        if key not in self.fingerprints:
            self.fingerprints[key] = data_of(run.cfg).fingerprint
        return self.fingerprints[key]

    def record(self, command: str, runs: list[Prepared], tuning: dict[str, Any] | None) -> None:
        """Write, in the ablation's folder, what was asked for, and which folder is which run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "command": command,
            "ablation": self.ablation.arguments,
            "runs": [run.entry for run in runs],
            "tuning": tuning,
        }
        put(self.folder / ABLATION, json.dumps(content, indent=2) + "\n")


def without_accelerator(cfg: DictConfig) -> DictConfig:
    """A config that this machine can try, whatever it lacks; the rest of it stays as it is."""
    cfg = cfg.copy()
    if cfg.trainer.accelerator != "cpu":
        cfg.trainer.accelerator = "cpu"
        cfg.trainer.precision = "32-true"
    return cfg


def shown(cells: list[str]) -> str:
    """A few cells, and how many more."""
    several = f", and {len(cells) - 3} cells more" if len(cells) > 3 else ""
    return "; ".join(cells[:3]) + several


def tag(factor: str, level: Any) -> str:
    """Return W&B's tag of a level; W&B takes 64 characters, so that of a longer one a hash ends it."""
    text = f"{factor}={level}"
    return text if len(text) <= 64 else f"{text[:55]}-{digest(text)[:8]}"


def folder_name(plan: Planned) -> str:
    """A run's settings as the name of a folder, as far as a file system lets it be one."""
    words = [f"{short(key)}={value}" for key, value in plan.settings.items()]
    return re.sub(r"[^\w.,=+-]", "_", ",".join(words))[:150]
