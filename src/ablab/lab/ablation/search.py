"""A search by Optuna instead of a grid: its trials are ordinary runs, and it can be interrupted and resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import TrialState

from ablab.data.reading import read_once
from ablab.disk import Lock
from ablab.errors import ConfigError, RunError, Stopped
from ablab.lab.ablation.ablation import Ablation, Overrides, PlannedRun
from ablab.lab.ablation.grid import STUDY, Grid
from ablab.lab.ablation.overrides import check_allowed_in_sweep, effective_overrides
from ablab.lab.ablation.results import monitored_score, status_of
from ablab.lab.ablation.sweep import print_resume_hint
from ablab.lab.config.schema import quote_value, show
from ablab.lab.launch.local import run_cell
from ablab.lab.run import signals
from ablab.lab.run.code import cache_hashes, code_of
from ablab.lab.run.folder import ABLATION, LOCK, check_name, read_config, read_record, relpath
from ablab.lab.run.identity import plain
from ablab.screen import silence_stdout
from ablab.status import status_lines


@read_once()
@cache_hashes()
def search(
    overrides: Overrides, cfg: DictConfig, loader: ConfigLoader, *, study: str, num_trials: int, seed: int
) -> None:
    """Search for the best values of overrides with several values, by the monitored metric.

    Each trial is a run. The study is an SQLite file in the folder of the search: the same command resumes it, an
    interrupted trial first. Each proposal depends only on the seed and the trials so far, so an interrupted search
    gives the same result as an uninterrupted one.

    Args:
        overrides: of the command line: norm=batchnorm,groupnorm is a choice, data.batch_size=range(8,64,8) a range of
            integers, "optimizer.lr=tag(log,interval(1e-3,1))" an interval, here on a logarithmic scale.
        cfg: composed from the overrides with a single value.
        loader: composes the others.
        study: the name of the search's folder in output_dir.
        num_trials: the total number of trials, including those of earlier launches.
        seed: of the sampler.

    Raises:
        ConfigError: there is nothing to search, the space is invalid or differs from that of the study, or no trial
            could run. A single invalid trial counts as failed, and the search continues.
        RunError: no trial has a value.
        Stopped: a signal arrived; the same command resumes.
    """
    check_name("hydra.sweeper.study", study)
    if num_trials < 1:
        raise ConfigError(f"hydra.sweeper.num_trials={num_trials}: at least 1 is needed")
    parsed = OverridesParser.create().parse_overrides(overrides)
    for one in parsed:
        key = one.get_key_element().lstrip("+")
        check_allowed_in_sweep(key, one)
        if key == "name":
            raise ConfigError(f"{one.input_line}: a search has its study's name; give hydra.sweeper.study=NAME instead")
    space = {one.get_key_element().lstrip("+"): distribution(one) for one in parsed if one.is_sweep_override()}
    common = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
    if not space:
        raise ConfigError("nothing to search: give a key several values, norm=batchnorm,groupnorm for example")
    ablation = Ablation(name=study, factors={}, seeds=[cfg.seed])
    grid = Grid(ablation, common, lambda overrides: loader.load_sweep_config(cfg, overrides), Path(str(cfg.output_dir)))
    if (grid.folder / ABLATION).exists():
        raise ConfigError(f"{relpath(grid.folder)}: an ablation is there; give another study, hydra.sweeper.study=NAME")
    grid.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = optuna.create_study(
        study_name=study,
        storage=f"sqlite:///{grid.folder / STUDY}",
        direction="maximize" if cfg.monitor.mode == "max" else "minimize",
        load_if_exists=True,
    )
    check_same_space(found, space)
    check_same_settings(found, {**effective_overrides(common), "seed": str(cfg.seed)})
    lock = Lock(grid.folder / LOCK)
    if not lock.acquire():
        raise ConfigError(f"{relpath(grid.folder)}: this search is in use by another process; wait, or end that one")
    try:
        with silence_stdout(cfg.quiet) as stdout, print_resume_hint(stdout):
            print(f"{study}: {num_trials} trials over {', '.join(space)}, in {relpath(grid.folder)}")
            while len(ended_trials(found)) < num_trials:
                run_trial(found, space, seed, grid, cfg)
                print(f"  {len(ended_trials(found))} of {num_trials} trials", flush=True)
    finally:
        lock.release()
    report_best(found, grid.folder, cfg)


def run_trial(
    study: optuna.Study, space: Mapping[str, BaseDistribution], seed: int, grid: Grid, cfg: DictConfig
) -> None:
    """Run one trial: one that an earlier launch left unfinished, or a new one."""
    number, params = interrupted_trial(study, space) or ask_trial(study, space, seed)
    text = " ".join(f"{key}={show(param)}" for key, param in params.items())
    try:
        with status_lines(text):
            value = run_objective(grid, params, cfg)
    except ConfigError as error:
        print(f"{text}: it cannot be: {error}", flush=True)
        study.tell(number, state=TrialState.FAIL)
        return
    print(f"{text}: {cfg.monitor.metric} {value:.4g}", flush=True)
    if math.isnan(value):
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, value)


def distribution(override: Override) -> BaseDistribution:
    """Return the Optuna distribution of an override with several values.

    Raises:
        ConfigError: Optuna cannot sample from it.
    """
    if override.get_key_element().lstrip("+") == "seed":
        raise ConfigError(
            f"{override.input_line}: the runs of a search have one seed, or the luckiest would be found; give one, "
            "seed=3; hydra.sweeper.seed is that of the search"
        )
    try:
        return parse_distribution(override)
    except ValueError as error:
        raise ConfigError(
            f"{override.input_line}: Optuna cannot choose from it ({error}); an interval begins at its smaller end, "
            "interval(0.1,1), and a logarithmic one above 0"
        ) from error


def parse_distribution(override: Override) -> BaseDistribution:
    value, log = override.value(), "log" in getattr(override.value(), "tags", ())
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        kind: Any = IntDistribution if whole else FloatDistribution
        return kind(value.start, value.end, log=log)
    if isinstance(value, RangeSweep) and all(isinstance(end, int) for end in (value.start, value.stop, value.step)):
        return IntDistribution(int(value.start or 0), int(value.stop or 0) - 1, step=int(value.step))
    return CategoricalDistribution([show(level) for level in override.sweep_iterator()])


def check_same_space(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> None:
    """Refuse to resume a study in which a key had other choices, which Optuna cannot combine.

    Raises:
        ConfigError: names the key.
    """
    for trial in study.get_trials(deepcopy=False):
        for key in trial.distributions.keys() & space.keys():
            try:
                check_distribution_compatibility(trial.distributions[key], space[key])
            except ValueError as error:
                raise ConfigError(
                    f"{key}: the study {study.study_name} has been asked with other choices ({error}); give those, or "
                    "another study, hydra.sweeper.study=NAME"
                ) from error


def check_same_settings(study: optuna.Study, settings: Mapping[str, str]) -> None:
    """Refuse to resume a study whose trials had other settings, since their values are not comparable.

    Raises:
        ConfigError: with both settings.
    """
    then = study.user_attrs.get("settings")
    if then is None or not study.get_trials(deepcopy=False):
        study.set_user_attr("settings", dict(settings))
    elif then != settings:
        keys = sorted(key for key in then.keys() | settings.keys() if then.get(key) != settings.get(key))
        changes = ", ".join(
            f"{key}: {then.get(key, 'not set')} then, {settings.get(key, 'not set')} now" for key in keys
        )
        raise ConfigError(
            f"the study {study.study_name} has been searched with other settings ({changes}); give those, or another "
            "study, hydra.sweeper.study=NAME"
        )


def warn_of_other_code(folder: Path) -> None:
    """Warn about trials that were made by other versions of the code: their values stay in the study."""
    folders = [file.parent for file in folder.glob("*/run.json") if status_of(file.parent) == "finished"]
    old = [f for f in folders if read_record(f)["identity"]["code"] != code_of(plain(read_config(f))).digest[:16]]
    if old:
        print(
            f"warning: {len(old)} of {len(folders)} runs of this search were made by other code than today's; "
            "hydra.sweeper.study=NAME begins another search",
            flush=True,
        )


def ended_trials(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))


def interrupted_trial(study: optuna.Study, space: Mapping[str, BaseDistribution]) -> tuple[int, dict[str, Any]] | None:
    """Return a trial that an earlier launch left unfinished; None if it lacks keys of this space."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return next(((trial.number, trial.params) for trial in trials if trial.params.keys() == space.keys()), None)


def ask_trial(study: optuna.Study, space: Mapping[str, BaseDistribution], seed: int) -> tuple[int, dict[str, Any]]:
    """Ask for the next trial; the sampler depends only on the seed and the number of trials."""
    study.sampler = optuna.samplers.TPESampler(seed=seed * 1_000_003 + len(study.get_trials(deepcopy=False)))
    trial = study.ask(dict(space))
    return trial.number, trial.params


def run_objective(grid: Grid, params: Mapping[str, Any], cfg: DictConfig) -> float:
    """Return the monitored metric of a trial's run, starting or resuming it as needed; NaN if it diverged or failed."""
    cell = {key: show(value) for key, value in params.items()}
    [run] = grid.prepare_all(
        [PlannedRun(cell, cfg.seed, tuple(f"{key}={quote_value(v)}" for key, v in params.items()))]
    )
    if not run.is_done and run_cell(run) == "stopped":
        raise Stopped(signals.requested.name if signals.requested else "a signal")
    return monitored_score(run.folder, cfg.monitor.metric)


def report_best(study: optuna.Study, folder: Path, cfg: DictConfig) -> None:
    """Write all trials to a file, and print the best one."""
    warn_of_other_code(folder)
    rows = [{**t.params, "value": t.value, "state": t.state.name.lower()} for t in ended_trials(study)]
    pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)
    if all(trial.value is None for trial in ended_trials(study)):
        raise no_result_error(study, folder, cfg)
    best = " ".join(f"{key}={show(value)}" for key, value in study.best_params.items())
    print(f"best: {best}: {cfg.monitor.metric} {study.best_value:.4g}; all of them: {relpath(folder / 'trials.csv')}")


def no_result_error(study: optuna.Study, folder: Path, cfg: DictConfig) -> Exception:
    """Return the error for a search in which no trial has a value."""
    states = {status_of(file.parent) for file in folder.glob("*/run.json")}
    if "finished" in states:
        return RunError(
            f"{study.study_name}: runs finished, but none has {cfg.monitor.metric}: there was no validation; "
            "trainer.limit_val_batches, val_check_interval and check_val_every_n_epoch say when there is"
        )
    if states:
        return RunError(f"{study.study_name}: no trial ended well; see the log.txt of its runs in {relpath(folder)}")
    return ConfigError(
        f"{study.study_name}: none of its trials could be run, for the reasons above; fix the command, and begin "
        "another study with it, hydra.sweeper.study=NAME"
    )
