"""Run an ablation, from its overrides to its report: `sweep` reads top to bottom."""

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
from ablab.lab.ablation.ablation import Ablation, Overrides
from ablab.lab.ablation.grid import DONE, Grid, PreparedRun
from ablab.lab.ablation.metrics import check_logged, metric_value
from ablab.lab.ablation.overrides import parse_ablation
from ablab.lab.ablation.progress import Progress
from ablab.lab.ablation.report import print_report, write_report
from ablab.lab.ablation.results import failure_summary, read_curve, read_results
from ablab.lab.ablation.tuning import tuning_outcome
from ablab.lab.launch.launcher import RunLauncher
from ablab.lab.run.code import cache_hashes
from ablab.lab.run.folder import LOG, read_record, relpath
from ablab.lab.run.provenance import command
from ablab.lab.run.redaction import redact
from ablab.screen import silence_stdout
from ablab.status import status_lines


@read_once()
@cache_hashes()
def sweep(overrides: Overrides, cfg: DictConfig, loader: ConfigLoader, launcher: Launcher) -> Any:
    """Execute the missing runs of an ablation, and write its report.

    Args:
        overrides: the overrides of the command line.
        cfg: composed from the overrides with a single value.
        loader: composes the others.
        launcher: executes the runs.

    Raises:
        ConfigError: a cell is invalid; nothing has run.
        RunError: some runs failed, the others are done; or all of them diverged.
        Stopped: a signal arrived; the same command resumes.
    """
    ablation, common = parse_ablation(overrides, cfg)
    grid = Grid(
        ablation,
        common,
        lambda overrides: loader.load_sweep_config(cfg, overrides),
        Path(str(cfg.output_dir)),
        is_remote=not (isinstance(launcher, RunLauncher) and launcher.is_local),
    )
    grid.check_folder()
    with silence_stdout(cfg.quiet) as stdout, print_resume_hint(stdout):
        num_cells = len(ablation.cells())
        print(
            f"{ablation.name}: {num_cells} cells × {ablation.runs_per_cell}, {ablation.num_runs()} runs, "
            f"in {relpath(grid.folder)}",
            flush=True,
        )
        plans, tuning = list(ablation.runs()), None
        if ablation.tune is not None:
            tuning = run_tuning(ablation, grid, launcher)
            best = {tuple(entry["cell"].values()): entry["value"] for entry in tuning["chosen"]}
            plans = [ablation.with_tuned_value(plan, best[tuple(plan.cell.values())]) for plan in plans]
        runs = grid.prepare_all(plans)
        grid.write_record(shlex.join(redact(command())), runs, tuning)
        launch_runs(runs, launcher)
        results = read_results(grid.folder)
        states = list(results.runs["status"])
        with status_lines("writing the report"):
            report = write_report(results, grid.folder) if "finished" in states else None
    if report is not None:
        print_report(report, grid.folder)
    check_done(runs)
    if "finished" not in states:
        if "diverged" not in states:
            raise RunError(
                f"none of {len(runs)} runs has a result:\n  {runs[0].plan.label}: {results.runs['error'][0]}"
            )
        raise Diverged(
            f"{states.count('diverged')} of {len(runs)} runs diverged, so there is no report; see {LOG} in each folder "
            f"of {relpath(grid.folder)}"
        )
    return results


@contextmanager
def print_resume_hint(stdout: TextIO) -> Iterator[None]:
    """Print how to resume an ablation that a signal stops."""
    try:
        yield
    except Stopped as stopped:
        print(f"stopped by {stopped}; go on with: {shlex.join(['python', *sys.argv])}", file=stdout, flush=True)
        raise


def run_tuning(ablation: Ablation, grid: Grid, launcher: Launcher) -> dict[str, Any]:
    """Execute the tuning runs, and return their outcome.

    Raises:
        RunError: some failed, so the choice would be biased.
    """
    tried = list(ablation.tuning_runs())
    values = [value for _, value in tried]
    runs = grid.prepare_all(plan for plan, _ in tried)
    if not all(run.is_done for run in runs):
        grid.write_record(shlex.join(redact(command())), [], tuning_outcome(ablation, runs, values) | {"chosen": []})
    launch_runs(runs, launcher, "tuning")
    check_done(runs, "tuning runs")
    return tuning_outcome(ablation, runs, values)


def check_done(runs: list[PreparedRun], what: str = "runs") -> None:
    """Check that every run is done.

    Raises:
        RunError: some are not.
    """
    if failed := [run for run in runs if run.status not in DONE]:
        raise RunError(format_failures(failed, len(runs), what))


def format_failures(failed: list[PreparedRun], total: int, what: str = "runs") -> str:
    """List the failed runs with their reasons and logs."""
    lines = [f"{len(failed)} of {total} {what} failed; the same command tries them again, and them alone"]
    for run in failed:
        log = run.folder / LOG
        lines.append(f"  {run.plan.label}: {failure_summary(run.folder)}")
        if log.exists():
            lines.append(f"    see {relpath(log)}")
    return "\n".join(lines)


def check_first_metrics(runs: list[PreparedRun]) -> None:
    """Refuse a metric that the first runs of all cells have not logged, since the others will not either.

    Raises:
        ConfigError: with the logged names. The runs are kept: their folders do not depend on the metrics.
    """
    metrics, found = runs[0].metrics, []
    for run in runs:
        with suppress(Exception):  # the report lists damaged runs
            record, curve = read_record(run.folder), read_curve(run.folder)
            [metric_value(metric, record, curve) for metric in metrics]
            found.append((record, curve))
    if found:
        check_logged(metrics, found)


def launch_runs(runs: list[PreparedRun], launcher: Launcher, title: str = "") -> None:
    """Launch all missing runs with the project's launchers, or another launcher of Hydra."""
    if isinstance(launcher, RunLauncher):
        launcher.launch_runs(runs, Progress(runs, title, check_first_metrics))
    elif missing := [run.overrides for run in runs if not run.is_done]:
        launcher.launch(missing, initial_job_idx=0)
