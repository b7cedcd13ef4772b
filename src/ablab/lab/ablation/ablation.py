"""The definition of an ablation: factors with levels, seeds, a baseline, and metrics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ablab.errors import ConfigError
from ablab.lab.config.errors import menu
from ablab.lab.config.schema import quote_value, show
from ablab.lab.run.folder import check_name

MAX_COUNTED_CELLS = 100_000  # larger grids are not enumerated just to count their cells

Cell = dict[str, str]  # a level for each factor
Overrides = list[str]  # as on the command line


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid: a level for each factor, a seed, and the overrides that set them.

    Args:
        cell: the level of each factor.
        seed: of everything random.
        overrides: of this run on a command line, except its seed.
        tuned: the tuned key and its value, if there is one.
    """

    cell: Cell
    seed: int
    overrides: tuple[str, ...]
    tuned: Cell = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """The settings that distinguish this run from the others."""
        return {**self.cell, **self.tuned, "seed": str(self.seed)}

    @property
    def label(self) -> str:
        """The settings as typed: norm=groupnorm data.batch_size=8 seed=0."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    @property
    def cell_label(self) -> str:
        """The settings as typed, without the seed."""
        return " ".join(f"{key}={value}" for key, value in {**self.cell, **self.tuned}.items()) or "every run"


class Tuning:
    """A key that is tuned for each cell, so that each is compared at its best.

    Args:
        key: the key to tune, for example `optimizer.lr`.
        values: the values to try.
        seeds: the seeds to tune with; None uses those of the ablation.
    """

    def __init__(self, *, key: str, values: list[float], seeds: list[int] | None = None) -> None:
        if len(set(values)) < 2:
            raise ConfigError(f"ablation.tune.values={show(values)}: at least 2 values are needed to choose from")
        self.key = key
        self.values = sorted(set(values))
        self.seeds = seeds


class Ablation:
    """A grid of runs and the questions that its report answers.

    Args:
        name: of its folder in output_dir.
        factors: what is varied. A key of the config, with its values; or any name, with an override (or a list of
            overrides) for each level.
        seeds: each cell is run with each of them.
        baseline: the level of one or more factors to compare the others with, everything else equal.
        metrics: the metrics of the report, the primary one first; see `ablab.lab.ablation.metrics`.
        question: that the ablation answers, in one sentence.
        claims: the rows of docs/claims.md that it settles.
        exclude: combinations of levels to leave out.
        tune: a key and values of it; each cell gets the value that is best in validation.
        max_runs: larger grids are refused as a likely mistake.
        mix_code: include runs made by other versions of the code.

    Attributes:
        from_overrides: the ablation comes from the command line alone, without a file.

    Raises:
        ConfigError: a factor has no levels, a level of the baseline does not exist, or the grid is too large.
    """

    def __init__(
        self,
        *,
        name: str,
        factors: dict[str, Any],
        seeds: list[int],
        baseline: dict[str, Any] | None = None,
        metrics: list[str] | None = None,
        question: str = "",
        claims: list[str] | None = None,
        exclude: list[dict[str, Any]] | None = None,
        tune: dict[str, Any] | None = None,
        max_runs: int = 1000,
        mix_code: bool = False,
    ) -> None:
        self.arguments = {
            "name": name,
            "factors": factors,
            "seeds": seeds,
            "baseline": baseline,
            "metrics": metrics,
            "question": question,
            "claims": claims,
            "exclude": exclude,
            "tune": tune,
            "max_runs": max_runs,
            "mix_code": mix_code,
        }
        check_name("ablation.name", str(name))
        self.name = str(name)
        self.question = question
        self.claims = claims or []
        self.from_overrides = False
        self.levels = {str(factor): parse_factor(str(factor), given) for factor, given in factors.items()}
        self.seeds = seeds
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"ablation.seeds={show(seeds)}: at least one seed is needed, and each once")
        self.baseline = self.check_levels("baseline", baseline or {})
        self.exclude = [self.check_levels("exclude", cell) for cell in exclude or []]
        self.metrics = metrics or ["test/accuracy"]
        self.tune = Tuning(**tune) if tune else None
        if self.tune is not None and self.tune.key in self.levels:
            raise ConfigError(f"ablation.tune.key={self.tune.key}: it is a factor, too; leave one of the two out")
        self.max_runs = max_runs
        self.mix_code = mix_code
        if self.num_runs() == 0:
            raise ConfigError("ablation.exclude: it leaves no cell to run; leave some of its entries out")
        if (size := self.num_runs()) > max_runs:
            counts = [f"{len(levels)} of {factor}" for factor, levels in self.levels.items()]
            excluded = ", less what is excluded" if self.exclude else ""
            raise ConfigError(
                f"ablation: {size:,} runs ({' × '.join([*counts, self.runs_per_cell])}{excluded}); if they are meant, "
                f"+ablation.max_runs={size}"
            )

    @property
    def factors(self) -> dict[str, list[str]]:
        """The names of the levels of each factor."""
        return {factor: list(levels) for factor, levels in self.levels.items()}

    @property
    def runs_per_cell(self) -> str:
        """A description of the number of runs per cell."""
        if self.tune is None:
            return f"{len(self.seeds)} seeds"
        tuning = f"{len(self.tune.values)} of {self.tune.key} × {len(self.tune.seeds or self.seeds)} seeds"
        return f"({tuning} + {self.num_after_tuning} seeds more)"

    @property
    def num_after_tuning(self) -> int:
        """The seeds per cell without a tuning run; a tuning run with the chosen value is reused."""
        return len({*self.seeds} - {*((self.tune.seeds or self.seeds) if self.tune else [])})

    def num_runs(self) -> int:
        """Return the number of runs, including tuning runs; for a huge grid, excluded ones are counted as well."""
        num_cells = math.prod(map(len, self.levels.values()))
        if self.exclude and num_cells <= MAX_COUNTED_CELLS:
            num_cells = len(self.cells())
        tuning = len(self.tune.values) * len(self.tune.seeds or self.seeds) if self.tune else 0
        return num_cells * (tuning + self.num_after_tuning)

    def check_levels(self, what: str, cell: Mapping[str, Any]) -> Cell:
        """Return a cell, or a part of one, after checking that its levels exist."""
        checked = {}
        for factor, value in cell.items():
            if factor not in self.levels:
                raise ConfigError(
                    f"ablation.{what}.{factor}: there is no such factor; {menu(factor, [*self.levels], 'the ablation')}"
                )
            level = show(value)
            if level not in self.levels[factor]:
                raise ConfigError(
                    f"ablation.{what}.{factor}={level}: it is no level; {menu(level, [*self.levels[factor]], factor)}"
                )
            checked[factor] = level
        return checked

    def cells(self) -> list[Cell]:
        """Return every combination of levels that is not excluded."""
        every = [dict(zip(self.levels, levels, strict=True)) for levels in itertools.product(*self.levels.values())]
        return [cell for cell in every if not any(part.items() <= cell.items() for part in self.exclude)]

    def runs(self) -> Iterator[PlannedRun]:
        """Yield every run, seed by seed, so that all cells of an unfinished grid have about as many seeds."""
        for seed in self.seeds:
            for cell in self.cells():
                yield PlannedRun(cell, seed, tuple(self.cell_overrides(cell)))

    def tuning_runs(self) -> Iterator[tuple[PlannedRun, float]]:
        """Yield every tuning run, with its value."""
        if self.tune is None:
            return
        for seed in self.tune.seeds or self.seeds:
            for cell in self.cells():
                for value in self.tune.values:
                    yield self.with_tuned_value(PlannedRun(cell, seed, tuple(self.cell_overrides(cell))), value), value

    def with_tuned_value(self, run: PlannedRun, value: float) -> PlannedRun:
        """Return a run with a value of the tuned key."""
        assert self.tune is not None
        tuned = {self.tune.key: show(value)}
        return PlannedRun(run.cell, run.seed, (*run.overrides, f"{self.tune.key}={show(value)}"), tuned)

    def cell_overrides(self, cell: Cell) -> Overrides:
        """Return the overrides of a cell."""
        return [override for factor, level in cell.items() for override in self.levels[factor][level]]


def parse_factor(factor: str, given: Any) -> dict[str, Overrides]:
    """Return the levels of a factor, each with its overrides."""
    if isinstance(given, Mapping):
        levels = {
            show(level): [overrides] if isinstance(overrides, str) else list(overrides)
            for level, overrides in given.items()
        }
    elif isinstance(given, list):
        levels = {show(value): [f"{factor}={quote_value(value)}"] for value in given}
    else:
        raise ConfigError(
            f"ablation.factors.{factor}={show(given)}: a list of values is needed, or a mapping of levels to overrides"
        )
    if not levels:
        raise ConfigError(f"ablation.factors.{factor}: it has no levels; give some, or leave it out")
    if isinstance(given, list) and len(levels) < len(given):
        raise ConfigError(f"ablation.factors.{factor}={show(given)}: a level is there twice")
    return levels
