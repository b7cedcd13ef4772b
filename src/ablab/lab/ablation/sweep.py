"""An ablation from its words to its report: `sweep` reads top to bottom."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hydra.core.config_loader import ConfigLoader
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from ablab.data.reading import read_once
from ablab.errors import Diverged, RunError, Stopped
from ablab.lab.ablation.ablation import Ablation, Words
from ablab.lab.ablation.grid import DONE, Grid, Prepared
from ablab.lab.ablation.metrics import check_logged, value
from ablab.lab.ablation.progress import Progress
from ablab.lab.ablation.report import show, write
from ablab.lab.ablation.results import read, read_curve, reason
from ablab.lab.ablation.tuning import outcome
from ablab.lab.ablation.words import asked_for
from ablab.lab.launch.launcher import RunLauncher
from ablab.lab.run.code import hashed_once
from ablab.lab.run.folder import LOG, read_record, short
from ablab.lab.run.provenance import command
from ablab.lab.run.redaction import redact
from ablab.screen import silence_stdout
from ablab.status import status_lines


@read_once()
@hashed_once()
def sweep(words: Words, cfg: DictConfig, loader: ConfigLoader, launcher: Launcher) -> Any:
    """Do what is missing of an ablation, and write its report.

    Args:
        words: of the command line.
        cfg: what is composed of those with one value.
        loader: composes the others.
        launcher: where the runs take place.

    Raises:
        ConfigError: something is wrong in some cell; nothing has been run.
        RunError: some runs failed, the others are done; or all of them diverged.
        Stopped: a signal came; the same command goes on.
    """
    ablation, common = asked_for(words, cfg)
    grid = Grid(
        ablation,
        common,
        lambda words: loader.load_sweep_config(cfg, words),
        Path(str(cfg.output_dir)),
        elsewhere=not (isinstance(launcher, RunLauncher) and launcher.is_local),
    )
    grid.check_folder()
    with silence_stdout(cfg.quiet) as stdout, told_of_a_stop(stdout):
        num_cells = len(ablation.cells())
        print(
            f"{ablation.name}: {num_cells} cells × {ablation.runs_of_a_cell}, {ablation.num_runs()} runs, "
            f"in {short(grid.folder)}",
            flush=True,
        )
        plans, tuning = list(ablation.runs()), None
        if ablation.tune is not None:
            tuning = tuned(ablation, grid, launcher)
            best = {tuple(entry["cell"].values()): entry["value"] for entry in tuning["chosen"]}
            plans = [ablation.at(plan, best[tuple(plan.cell.values())]) for plan in plans]
        runs = grid.prepared_all(plans)
        grid.record(shlex.join(redact(command())), runs, tuning)
        carry_out(runs, launcher)
        results = read(grid.folder)
        states = list(results.runs["status"])
        with status_lines("writing the report"):
            report = write(results, grid.folder) if "finished" in states else None
    if report is not None:
        show(report, grid.folder)
    demand(runs)
    if "finished" not in states:
        if "diverged" not in states:
            raise RunError(
                f"none of {len(runs)} runs has a result:\n  {runs[0].plan.label}: {results.runs['error'][0]}"
            )
        raise Diverged(
            f"{states.count('diverged')} of {len(runs)} runs diverged, so there is no report; see {LOG} in each folder "
            f"of {short(grid.folder)}"
        )
    return results


@contextmanager
def told_of_a_stop(stdout: TextIO) -> Iterator[None]:
    """Say how to go on with an ablation that a signal stops."""
    try:
        yield
    except Stopped as stopped:
        print(f"stopped by {stopped}; go on with: {shlex.join(['python', *sys.argv])}", file=stdout, flush=True)
        raise


def tuned(ablation: Ablation, grid: Grid, launcher: Launcher) -> dict[str, Any]:
    """Do the runs that tune; what they found.

    Raises:
        RunError: some failed: without them the choice would be another one.
    """
    tried = list(ablation.tuning_runs())
    values = [value for _, value in tried]
    runs = grid.prepared_all(plan for plan, _ in tried)
    if not all(run.done for run in runs):
        grid.record(shlex.join(redact(command())), [], outcome(ablation, runs, values) | {"chosen": []})
    carry_out(runs, launcher, "tuning")
    demand(runs, "tuning runs")
    return outcome(ablation, runs, values)


def demand(runs: list[Prepared], what: str = "runs") -> None:
    """Have every run done.

    Raises:
        RunError: some are not.
    """
    if failed := [run for run in runs if run.status not in DONE]:
        raise RunError(report_failed(failed, len(runs), what))


def report_failed(failed: list[Prepared], total: int, what: str = "runs") -> str:
    """What did not work, and where to look."""
    lines = [f"{len(failed)} of {total} {what} failed; the same command tries them again, and them alone"]
    for run in failed:
        log = run.folder / LOG
        lines.append(f"  {run.plan.label}: {reason(run.folder)}")
        if log.exists():
            lines.append(f"    see {short(log)}")
    return "\n".join(lines)


def have_metrics(runs: list[Prepared]) -> None:
    """Refuse a metric that the first runs of all cells have not logged: the others will not either.

    Raises:
        ConfigError: with what was logged. It is not lost: the metrics are no part of a run.
    """
    metrics, found = runs[0].metrics, []
    for run in runs:
        with suppress(Exception):  # a damaged run, which the report names
            record, curve = read_record(run.folder), read_curve(run.folder)
            [value(metric, record, curve) for metric in metrics]
            found.append((record, curve))
    if found:
        check_logged(metrics, found)


def carry_out(runs: list[Prepared], launcher: Launcher, title: str = "") -> None:
    """Carry out all missing runs by the project's launchers, or by another one of Hydra's."""
    if isinstance(launcher, RunLauncher):
        launcher.carry_out(runs, Progress(runs, title, have_metrics))
    elif missing := [run.words for run in runs if not run.done]:
        launcher.launch(missing, initial_job_idx=0)
