"""What an ablation is: factors with levels, seeds, a baseline, and what is measured."""

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

MAX_COUNTED_CELLS = 100_000  # cells that are made only to be counted

Cell = dict[str, str]  # a level for each factor
Overrides = list[str]  # of the command line


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid: a level for each factor, a seed, and the words that make them so.

    Args:
        cell: the level of each factor.
        seed: of everything random.
        words: what the command line of this run alone would have, its seed aside.
        tuned: the tuned key and its value, where there is one.
    """

    cell: Cell
    seed: int
    overrides: tuple[str, ...]
    tuned: Cell = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, str]:
        """What tells this run from the others."""
        return {**self.cell, **self.tuned, "seed": str(self.seed)}

    @property
    def label(self) -> str:
        """The settings as they are typed: norm=groupnorm data.batch_size=8 seed=0."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    @property
    def cell_label(self) -> str:
        """The same without the seed."""
        return " ".join(f"{key}={value}" for key, value in {**self.cell, **self.tuned}.items()) or "every run"


class Tuning:
    """A key that is tuned for every cell, so that each is seen at its best.

    Args:
        key: what is tuned, `optimizer.lr` for example.
        values: those that are tried.
        seeds: the seeds that decide; None takes those of the ablation.
    """

    def __init__(self, *, key: str, values: list[float], seeds: list[int] | None = None) -> None:
        if len(set(values)) < 2:
            raise ConfigError(f"ablation.tune.values={show(values)}: at least 2 values are needed to choose from")
        self.key = key
        self.values = sorted(set(values))
        self.seeds = seeds


class Ablation:
    """A grid of runs and what is to be said of it.

    Args:
        name: of its folder in output_dir.
        factors: what is varied. A key of the config, with its values; or any name, with a text (or a list of them)
            for each level: what the command line would have.
        seeds: each cell is run with each of them.
        baseline: the level of one factor, or of several, that the others are compared with, everything else equal.
        metrics: what the report is about, the first before all; see `ablab.lab.ablation.metrics`.
        question: that it answers, in one sentence.
        claims: the rows of docs/claims.md that it settles.
        exclude: combinations of levels that are left out.
        tune: a key, and values of it, of which every cell gets the one that is best in validation.
        max_runs: a larger grid is refused, as a slip of the hand.
        mix_code: let runs count that were made by other code than today's.

    Attributes:
        from_overrides: the command line alone made it, without a file.

    Raises:
        ConfigError: a factor without levels, a baseline that is no level, a grid that is too large.
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
        """The levels of each factor, as they are called."""
        return {factor: list(levels) for factor, levels in self.levels.items()}

    @property
    def runs_per_cell(self) -> str:
        """How many there are, in words."""
        if self.tune is None:
            return f"{len(self.seeds)} seeds"
        tuning = f"{len(self.tune.values)} of {self.tune.key} × {len(self.tune.seeds or self.seeds)} seeds"
        return f"({tuning} + {self.num_after_tuning} seeds more)"

    @property
    def num_after_tuning(self) -> int:
        """The seeds of a cell that no tuning run has: one that has is the run, and not done again."""
        return len({*self.seeds} - {*((self.tune.seeds or self.seeds) if self.tune else [])})

    def num_runs(self) -> int:
        """All runs of the grid, those that tune among them; of a huge one the excluded ones, too."""
        num_cells = math.prod(map(len, self.levels.values()))
        if self.exclude and num_cells <= MAX_COUNTED_CELLS:
            num_cells = len(self.cells())
        tuning = len(self.tune.values) * len(self.tune.seeds or self.seeds) if self.tune else 0
        return num_cells * (tuning + self.num_after_tuning)

    def check_levels(self, what: str, cell: Mapping[str, Any]) -> Cell:
        """A cell, or a part of one, whose levels exist."""
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
        """Every combination of levels that is not excluded."""
        every = [dict(zip(self.levels, levels, strict=True)) for levels in itertools.product(*self.levels.values())]
        return [cell for cell in every if not any(part.items() <= cell.items() for part in self.exclude)]

    def runs(self) -> Iterator[PlannedRun]:
        """Every run; a seed of all cells before the next one, so that an unfinished grid is an even one."""
        for seed in self.seeds:
            for cell in self.cells():
                yield PlannedRun(cell, seed, tuple(self.cell_overrides(cell)))

    def tuning_runs(self) -> Iterator[tuple[PlannedRun, float]]:
        """Every run that decides on the tuned key, with its value."""
        if self.tune is None:
            return
        for seed in self.tune.seeds or self.seeds:
            for cell in self.cells():
                for value in self.tune.values:
                    yield self.with_tuned_value(PlannedRun(cell, seed, tuple(self.cell_overrides(cell))), value), value

    def with_tuned_value(self, run: PlannedRun, value: float) -> PlannedRun:
        """A run with a value of the tuned key."""
        assert self.tune is not None
        tuned = {self.tune.key: show(value)}
        return PlannedRun(run.cell, run.seed, (*run.overrides, f"{self.tune.key}={show(value)}"), tuned)

    def cell_overrides(self, cell: Cell) -> Overrides:
        """What the command line of a cell would have."""
        return [word for factor, level in cell.items() for word in self.levels[factor][level]]


def parse_factor(factor: str, given: Any) -> dict[str, Overrides]:
    """The levels of a factor, each with its words."""
    if isinstance(given, Mapping):
        levels = {show(level): [words] if isinstance(words, str) else list(words) for level, words in given.items()}
    elif isinstance(given, list):
        levels = {show(value): [f"{factor}={quote_value(value)}"] for value in given}
    else:
        raise ConfigError(f"ablation.factors.{factor}={show(given)}: a list of values is needed, or words a level")
    if not levels:
        raise ConfigError(f"ablation.factors.{factor}: it has no levels; give some, or leave it out")
    if isinstance(given, list) and len(levels) < len(given):
        raise ConfigError(f"ablation.factors.{factor}={show(given)}: a level is there twice")
    return levels
