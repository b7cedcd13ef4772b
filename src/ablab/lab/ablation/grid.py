"""The runs of an ablation, each with its config and its folder."""

from __future__ import annotations

import copy
import hashlib
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

from ablab.data.reading import reading_key
from ablab.digest import digest
from ablab.errors import ConfigError
from ablab.lab.ablation import metrics
from ablab.lab.ablation.ablation import Ablation, Cell, Overrides, PlannedRun
from ablab.lab.ablation.overrides import effective_overrides, last_part
from ablab.lab.ablation.results import replace_text, status_of
from ablab.lab.config.schema import check_config, is_guest, quote_value, show
from ablab.lab.config.yaml_files import CONF
from ablab.lab.run.code import code_of
from ablab.lab.run.folder import ABLATION, read_config, read_record
from ablab.lab.run.folder import relpath as short_path
from ablab.lab.run.identity import identity, plain
from ablab.lab.run.redaction import redact
from ablab.lab.run.resume import force_add_open_keys
from ablab.status import with_progress

Compose = Callable[[Overrides], DictConfig]
STUDY = "study.db"  # the study of a search, in its folder
DONE = ("finished", "diverged")  # running these again gives the same end
MAX_NAME_BYTES = 150  # bytes of a folder's name before its hash; file systems allow 255


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A run that is ready to start.

    Args:
        plan: its place in the grid.
        cfg: its full config.
        hydra: Hydra's config of the run, including its overrides.
        metrics: the metrics that it must log.
        folder: its folder, existing or not; the name depends on the plan, and on config and code.
    """

    plan: PlannedRun
    cfg: DictConfig = field(repr=False)
    hydra: DictConfig = field(repr=False)
    folder: Path
    metrics: list[str] = field(repr=False)

    @property
    def overrides(self) -> Overrides:
        """The overrides of a command line for the same run."""
        return list(self.hydra.hydra.overrides.task)

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of the run in ablation.json."""
        return {"folder": self.folder.name, "cell": self.plan.cell, "seed": self.plan.seed}

    @property
    def status(self) -> str:
        return status_of(self.folder)

    @property
    def is_done(self) -> bool:
        return self.status in DONE


class Grid:
    """Composes each cell once, and assigns a folder to every run.

    Args:
        ablation: the definition of the grid.
        common: the overrides common to all runs.
        compose: composes a config from overrides.
        output_dir: the parent of the ablation's folder.
        is_remote: the runs execute on other machines, which may have data and devices that this one lacks.
    """

    def __init__(
        self, ablation: Ablation, common: Overrides, compose: Compose, output_dir: Path, *, is_remote: bool = False
    ) -> None:
        self.ablation = ablation
        self.common = common
        self.is_remote = is_remote
        self.compose = compose
        self.folder = (output_dir / ablation.name).absolute()
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.fingerprints: dict[str, str | None] = {}  # of the data, by their settings

    def prepare(self, plan: PlannedRun) -> PreparedRun:
        """Return a run with its config and folder."""
        cfg = copy.deepcopy(self.compose_cell(plan))
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
            "cell={{{}}}".format(",".join(f"{k}:{quote_value(v)}" for k, v in plan.cell.items())),
        ]
        if cfg.logger.get("wandb") is not None:
            tags = [*cfg.logger.wandb.tags, *(wandb_tag(factor, level) for factor, level in plan.cell.items())]
            cfg.logger.wandb.group = cfg.logger.wandb.group or self.ablation.name
            cfg.logger.wandb.tags = tags
            added += [
                f"logger.wandb.group={quote_value(cfg.logger.wandb.group)}",
                f"logger.wandb.tags={quote_value(tags)}",
            ]
        content: Any = OmegaConf.to_container(cfg, resolve=True)
        known = identity(content, code=code_of(content).digest, data="")
        folder = self.folder / folder_name(plan, known["run"])
        if self.ablation.mix_code and status_of(folder) not in DONE:
            folder = self.find_same_config(known["config"], plan.cell) or folder
        cfg.folder = str(folder)
        with read_write(hydra), open_dict(hydra):
            hydra.hydra.mode = RunMode.MULTIRUN
            hydra.hydra.overrides.task = [*self.run_overrides(plan), *added, f"folder={quote_value(str(folder))}"]
        return PreparedRun(plan, cfg, hydra, folder, self.ablation.metrics)

    def run_overrides(self, plan: PlannedRun) -> Overrides:
        """Return the overrides of a run, without those that the ablation itself adds."""
        return force_add_open_keys([*self.common, *plan.overrides])

    def compose_cell(self, plan: PlannedRun) -> DictConfig:
        """Return the config of a run except its seed, composed once for all seeds, since composing is slow."""
        if plan.overrides not in self.composed:
            self.composed[plan.overrides] = self.compose(self.run_overrides(plan))
        return self.composed[plan.overrides]

    def find_same_config(self, config: str, cell: Cell) -> Path | None:
        """Return the newest finished run with this config, regardless of its code.

        Args:
            config: the hash of the config, which excludes data paths.
            cell: the levels of the run; a run with other levels of these factors does not count.
        """
        found = [folder for folder, record in self.records if record["identity"]["config"] == config]
        found = [folder for folder in found if not differing_factors(cell, read_config(folder).get("cell") or {})]
        return max(found, key=lambda folder: (folder / "run.json").stat().st_mtime, default=None)

    @cached_property
    def records(self) -> list[tuple[Path, dict[str, Any]]]:
        """Every run that was done before this grid started any, with its record."""
        done = [file.parent for file in sorted(self.folder.glob("*/run.json")) if status_of(file.parent) in DONE]
        return [(folder, read_record(folder)) for folder in done]

    def prepare_all(self, plans: Iterable[PlannedRun]) -> list[PreparedRun]:
        """Prepare runs, and check that each of them can be executed."""
        plans = list(plans)
        with closing(with_progress(plans, len(plans), "composing the configs")) as shown:
            runs = [self.prepare(plan) for plan in shown]
        check_distinct_folders(runs)
        self.check_runs(runs)
        return runs

    def check_runs(self, runs: list[PreparedRun]) -> None:
        """Check every cell before any run starts.

        Raises:
            ConfigError: with one or more lines for each invalid cell.
        """
        from ablab.lab.train import check_buildable

        seen: set[tuple[str, ...]] = set()
        found: dict[str, list[str]] = {}
        with closing(with_progress(runs, len(runs), "trying each cell without memory")) as shown:
            for run in shown:
                if run.plan.overrides in seen:
                    continue
                seen.add(run.plan.overrides)
                try:
                    check_config(run.cfg, CONF / "train.yaml")
                    metrics.check_metrics(self.ablation.metrics, run.cfg)
                    if not run.is_done:
                        HydraConfig.instance().set_config(run.hydra)
                        found_data = check_buildable(without_accelerator(run.cfg) if self.is_remote else run.cfg)
                        if found_data is not None:
                            self.fingerprints[reading_key(plain(run.cfg.data))] = found_data
                except ConfigError as error:
                    found.setdefault(str(error), []).append(run.plan.cell_label)
        if found:
            lines = [f"{message}\n  in {format_cells(cells)}" for message, cells in found.items()]
            raise ConfigError("\n".join([*lines, "nothing has been run; ablation.exclude leaves cells out"]))
        for run in runs:
            self.check_same_data(run)

    def check_same_data(self, run: PreparedRun) -> None:
        """Refuse an existing run that started with other data: the name of its folder does not depend on data paths.

        Raises:
            ConfigError: with both fingerprints.
        """
        try:
            then = read_record(run.folder)["data"]["fingerprint"] if (run.folder / "run.json").exists() else None
        except (ConfigError, KeyError, TypeError):  # a damaged run is tried, and reports the damage
            return
        if then is None or is_guest(run.cfg) or (now := self.fingerprint(run)) is None:
            return
        if then != now:
            name = "name" if run.cfg.ablation is None else "ablation.name"
            raise ConfigError(
                f"data: {short_path(run.folder)} began with other data (fingerprint {then[:12]}) than these "
                f"({now[:12]}); give the files of then, or the ablation another name, {name}=…; nothing has been run"
            )

    def fingerprint(self, run: PreparedRun) -> str | None:
        """Return the fingerprint of a run's data, read once per data set; None if this machine lacks the data."""
        from ablab.lab.train import build_data

        key = reading_key(plain(run.cfg.data))
        if key not in self.fingerprints:
            try:
                self.fingerprints[key] = build_data(run.cfg).fingerprint
            except Exception as error:
                if not self.is_remote:
                    raise
                print(f"warning: these data are not compared with those of finished runs: {error}", flush=True)
                self.fingerprints[key] = None
        return self.fingerprints[key]

    @property
    def design(self) -> dict[str, Any]:
        """The properties that distinguish this ablation from another with the same name, except levels and seeds."""
        return {
            "factors": sorted(self.ablation.factors),
            # in a sweep without a file, the baseline is the first level, which nobody chose
            "baseline": None if self.ablation.from_overrides else self.ablation.baseline,
            "tuned key": self.ablation.tune.key if self.ablation.tune else None,
            "settings": effective_overrides(self.common),
        }

    def check_folder(self) -> None:
        """Refuse a folder of another ablation before anything runs, since its report would be replaced.

        More or fewer levels and seeds are the same ablation.

        Raises:
            ConfigError: with the differences and the remedy.
        """
        name = "name" if self.ablation.from_overrides else "ablation.name"
        remedy = f"give this one another name, {name}=…; nothing has been run"
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{short_path(self.folder)}: it is a file; {remedy}")
        for file, what in (("run.json", "a run"), (STUDY, "a search")):
            if (self.folder / file).exists():
                raise ConfigError(f"{short_path(self.folder)}: {what} is there; {remedy}")
        if not (self.folder / ABLATION).exists() or not any(self.folder.glob("*/run.json")):
            return
        try:
            there = json.loads((self.folder / ABLATION).read_text(encoding="utf-8"))
            old, hashes = there.get("asked", {}), there.get("asked_sha256", {})
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{short_path(self.folder / ABLATION)}: it cannot be read ({error}), so its contents are unknown; "
                f"bring it back, or {remedy}"
            ) from error
        differ = [part for part, found in self.design_hashes.items() if hashes.get(part, found) != found]
        if not differ:
            return
        if differ == ["baseline"]:
            remedy = f"python scripts/report.py {short_path(self.folder)} --baseline … compares anew, or {remedy}"
        lines = [
            f"  {part}: {format_part(old.get(part))} there, {format_part(self.design[part])} now" for part in differ
        ]
        raise ConfigError("\n".join([f"{short_path(self.folder)}: another ablation is there:", *lines, f"  {remedy}"]))

    @property
    def design_hashes(self) -> dict[str, str]:
        """A hash of each part of `design`, since secrets are removed from the copy in the record."""
        texts = {part: json.dumps(value, sort_keys=True) for part, value in self.design.items()}
        return {part: hashlib.sha256(text.encode()).hexdigest() for part, text in texts.items()}

    def write_record(self, command: str, runs: list[PreparedRun], tuning: dict[str, Any] | None) -> None:
        """Write ablation.json: the command and the grid, without secrets, and the folder of each run.

        Levels keep their names, which the report needs to find the runs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "command": command,
            "ablation": without_secrets(self.ablation.arguments),
            "asked": redact(self.design),
            "asked_sha256": self.design_hashes,
            "runs": [run.entry for run in runs],
            "tuning": tuning,
        }
        replace_text(self.folder / ABLATION, json.dumps(content, indent=2) + "\n")


def without_secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an ablation's arguments without secrets in its texts and in the overrides of its levels."""
    factors = {
        factor: redact(levels) if isinstance(levels, dict) else levels
        for factor, levels in arguments["factors"].items()
    }
    return {**arguments, "factors": factors, **redact({key: arguments[key] for key in ("question", "claims")})}


def without_accelerator(cfg: DictConfig) -> DictConfig:
    """Return a config that this machine can check without the accelerator."""
    cfg = cfg.copy()
    if cfg.trainer.accelerator != "cpu":
        cfg.trainer.accelerator = "cpu"
        cfg.trainer.precision = "32-true"
    return cfg


def format_part(value: Any) -> str:
    """Describe one part of the design of an ablation."""
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    return ", ".join(value) or "none" if isinstance(value, list) else show(value)


def format_cells(cells: list[str]) -> str:
    """List a few cells and the number of others."""
    several = f", and {len(cells) - 3} cells more" if len(cells) > 3 else ""
    return "; ".join(cells[:3]) + several


def wandb_tag(factor: str, level: Any) -> str:
    """Return a W&B tag for a level; W&B allows 64 characters, so longer tags end with a hash."""
    text = f"{factor}={level}"
    return text if len(text) <= 64 else f"{text[:55]}-{digest(text)[:8]}"


def check_distinct_folders(runs: list[PreparedRun]) -> None:
    """Refuse two runs with the same folder: the second would count as done.

    Raises:
        ConfigError: with both runs.
    """
    taken: dict[str, PreparedRun] = {}
    for run in runs:
        other = taken.setdefault(run.folder.name.casefold(), run)
        if other is not run:
            raise ConfigError(
                f"{other.plan.label} and {run.plan.label} have the same folder, {short_path(run.folder)}; leave one of "
                "them out, or give a level another name; nothing has been run"
            )


def differing_factors(cell: Cell, other: Cell) -> list[str]:
    """Return the factors whose levels differ between two cells."""
    return [factor for factor, level in cell.items() if str(other.get(factor, level)) != level]


def folder_name(plan: PlannedRun, identity: str) -> str:
    """Return the name of a run's folder: its settings, as far as file systems allow, and a hash.

    The hash covers the settings too, since the readable part may be equal for two cells: special characters become _,
    long names are cut, and some file systems ignore case or Unicode normalization.

    Args:
        plan: the run's place in the grid.
        identity: a hash of its config and of the code.
    """
    settings = ",".join(f"{last_part(key)}={value}" for key, value in plan.settings.items())
    readable = re.sub(r"[^\w.,=+-]", "_", settings).encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    every = json.dumps([identity, sorted(plan.settings.items())])
    return f"{readable}_{hashlib.sha256(every.encode()).hexdigest()[:8]}"
