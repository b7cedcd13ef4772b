"""Show the progress of a grid: a table on a terminal, a line per run in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ablab.lab.ablation.grid import PreparedRun
from ablab.lab.run.folder import LOG, relpath
from ablab.screen import is_interactive

FirstRunsCallback = Callable[[list[PreparedRun]], None]
STATUS_SIGNS = {
    "finished": ("●", "green"),
    "running": ("◐", "yellow"),
    "taken": ("◌", "yellow"),  # in use by another launch
    "diverged": ("∞", "magenta"),
    "failed": ("✗", "red"),
}
MAX_ROWS = 40  # of the table; larger grids only get the counts
LONG_RUN_SECONDS = 5.0  # seconds; the start of longer runs is logged too


class Progress:
    """Tracks and displays runs as they start and end.

    Args:
        runs: all runs of the grid, including those done.
        title: the purpose of the runs.
        check_first_runs: called once with one finished run of each cell, as soon as all cells have one.
    """

    def __init__(
        self, runs: list[PreparedRun], title: str = "", check_first_runs: FirstRunsCallback | None = None
    ) -> None:
        self.check_first_runs = check_first_runs
        self.title = title
        self.status = {run: run.status if run.is_done else "missing" for run in runs}
        self.watched = is_interactive()
        # rich would take FORCE_COLOR, which notebooks set for subprocesses, for a terminal;
        # labels may have brackets and colons that are not markup
        self.console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, force_terminal=self.watched)
        self.began_at: dict[PreparedRun, float] = {}
        self.started = 0.0
        self.num_ended = 0
        self.live = Live(
            console=self.console,
            get_renderable=self.table,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,  # the output of runs goes to their logs
            redirect_stderr=False,
        )

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if self.watched:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.live.stop()

    def run_started(self, run: PreparedRun) -> None:
        self.status[run] = "running"
        self.began_at[run] = time.monotonic()
        mean = (time.monotonic() - self.started) / self.num_ended if self.num_ended else math.inf
        if not self.watched and mean > LONG_RUN_SECONDS:
            self.console.print(f"{run.plan.label}: begun; {relpath(run.folder / LOG)} follows it", soft_wrap=True)

    def run_ended(self, run: PreparedRun, status: str) -> None:
        """Record the status of a run; "taken" if another launch uses it, which may be reported repeatedly."""
        self.status[run] = status
        if status == "taken":
            self.began_at.pop(run, None)
            return
        if self.check_first_runs is not None and status == "finished" and (runs := self.first_run_of_each_cell()):
            self.check_first_runs(runs)
            self.check_first_runs = None
        if run in self.began_at:
            self.num_ended += 1
        if not self.watched:
            took = f"{time.monotonic() - self.began_at[run]:.1f} s" if run in self.began_at else "in another launch"
            self.console.print(f"{run.plan.label}: {status} ({took}); {self.summary()}", soft_wrap=True)

    def first_run_of_each_cell(self) -> list[PreparedRun]:
        """Return a finished run of each cell; empty until all cells have one."""
        found: dict[tuple[str, ...], PreparedRun | None] = {}
        for run, status in self.status.items():
            cell = tuple(run.plan.cell.values())
            found[cell] = found.get(cell) or (run if status == "finished" else None)
        runs = [run for run in found.values() if run is not None]
        return runs if len(runs) == len(found) else []

    def summary(self) -> str:
        """Describe the progress of the grid."""
        states = list(self.status.values())
        parts = [f"{self.title} {states.count('finished')} of {len(states)} finished".lstrip()]
        names = {"taken": "in another launch"}
        for status in ("running", "taken", "diverged", "failed"):
            if number := states.count(status):
                parts.append(f"{number} {names.get(status, status)}")
        left = sum(status in ("missing", "running") for status in states)
        if self.num_ended and left:
            seconds = (time.monotonic() - self.started) * left / self.num_ended
            parts.append(f"about {format_duration(seconds)} left")
        return ", ".join(parts)

    def table(self) -> Group:
        """Return a table with a row for each cell and a symbol for each seed."""
        cells: dict[str, dict[int, str]] = {}
        for run, status in self.status.items():
            cells.setdefault(run.plan.cell_label, {})[run.plan.seed] = status
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for label, states in list(cells.items())[:MAX_ROWS] if len(cells) <= MAX_ROWS else []:
            signs = Text()
            for status in states.values():
                sign, style = STATUS_SIGNS.get(status, ("·", "dim"))
                signs.append(sign + " ", style)
            table.add_row(Text(label), signs)
        return Group(table, Text(self.summary()))


def format_duration(seconds: float) -> str:
    """Return a duration in readable units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
