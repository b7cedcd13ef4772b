"""The figures of an ablation, for use in a paper: one colour per level throughout, 95 % bands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from ablab.lab.ablation import statistics
from ablab.lab.ablation.metrics import is_until_metric
from ablab.lab.ablation.overrides import last_part
from ablab.lab.ablation.results import Results

# Okabe & Ito 2008, safe for colour blindness
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F", "#6B4C9A"]
MARKERS = "osD^vPX<>*"
PANEL = (3.4, 2.6)  # inches; the width of a column of a paper
LEGEND = 1.1  # inches beside the panels
LEGEND_LETTERS, LETTER_INCHES = 12, 0.07  # letters that fit into LEGEND, and inches for each further one
MAX_PANELS = 8
GENERIC_LEVELS = ("true", "false", "none", "null", "full")  # levels that need their factor's name
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "svg.hashsalt": "ablab",
}


def figures(results: Results) -> Iterator[tuple[str, str, Figure]]:
    """Yield every figure for which there are data: a file name, a caption, and the figure."""
    ablation = results.ablation
    drawn = Drawing(results)
    for metric in ablation.metrics:
        if len(statistics.finite_values(results.runs[metric])):
            yield file_name(metric), f"{readable_name(metric)}: mean, 95 % interval, every seed", drawn.metric(metric)
    primary = ablation.metrics[0]
    compared = statistics.comparisons(results.runs, list(ablation.factors), ablation.baseline, primary)
    if len(compared) and compared["n"].max() > 0:
        title = f"{readable_name(primary)}: differences to the baseline, paired by seed"
        yield "differences", title, drawn.differences(compared)
    for column in ("val/loss", "train/loss"):
        logged = [curve[column].astype(float) for curve in results.curves.values() if column in curve]
        if any(np.isfinite(values).any() for values in logged):
            yield f"curves_{file_name(column)}", f"{readable_name(column)} over the steps", drawn.curves(column)
    # with a third factor, each cell of the map would be a mean over that factor
    if len(drawn.shown) == 2 and len(statistics.finite_values(results.runs[primary])):
        yield "heat_map", f"{readable_name(primary)}: means of the cells", drawn.heat_map(primary)
    if results.tuning is not None:
        title = f"{readable_name(results.tuning_metric)} over {last_part(results.tuned_key)}, by which it was chosen"
        yield "tuning", title, drawn.tuning()


class Drawing:
    """Assigns factors to colours, axis and panels once for all figures, and draws them.

    Colours show the factor of the baseline; the axis shows a numeric factor, or the largest other one; remaining
    factors become panels.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.factors = results.ablation.factors
        self.shown = [factor for factor, levels in self.factors.items() if len(levels) > 1] or list(self.factors)[:1]
        baseline = [factor for factor in results.ablation.baseline if factor in self.shown]
        numeric = [factor for factor in self.shown if is_numeric(self.factors[factor])]
        others = [factor for factor in self.shown if factor not in baseline[:1]]
        axis = next((factor for factor in numeric if factor in others), None)
        axis = axis or max(others, key=lambda factor: len(self.factors[factor]), default=None)
        self.axis = axis or (self.shown[0] if self.shown else None)
        colours = [factor for factor in [*baseline, *self.shown] if factor != self.axis]
        self.colour = colours[0] if colours else None
        self.panels = [factor for factor in self.shown if factor not in (self.axis, self.colour)]

    def levels(self, factor: str | None) -> list[str]:
        return self.factors[factor] if factor is not None else [""]

    def style(self, level: str, factor: str | None = None) -> dict[str, Any]:
        """Return the style of a level in every figure."""
        i = self.levels(factor or self.colour).index(level)
        return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}

    def runs(self, **levels: str) -> pd.DataFrame:
        """Return the runs with some levels."""
        found = self.results.runs
        for factor, level in levels.items():
            found = found[found[factor] == level]
        return found

    def parts(self, panels: Sequence[str]) -> list[dict[str, str]]:
        """Return the levels of each panel."""
        every = product(*(self.factors[factor] for factor in panels))
        return [dict(zip(panels, levels, strict=True)) for levels in every][:MAX_PANELS]

    def metric(self, metric: str) -> Figure:
        """Draw a metric over the levels of a factor, a line or a row of dots for each level of another."""
        assert self.axis is not None or not self.factors
        levels = self.levels(self.axis)
        numbers = is_numeric(levels)
        parts = self.parts(self.panels)
        with figure_panels(len(parts), width=PANEL[0] if numbers else max(PANEL[0], 0.75 * len(levels) + 1.2)) as (
            figure,
            axes,
        ):
            for part, ax in zip(parts, axes, strict=True):
                for i, level in enumerate(self.levels(self.colour)):
                    chosen = {**part, **({self.colour: level} if self.colour else {})}
                    offset = (
                        0.0
                        if numbers
                        else (i - (len(self.levels(self.colour)) - 1) / 2) * 0.8 / (len(self.levels(self.colour)) + 0.5)
                    )
                    self.line(ax, metric, chosen, level, offset, joined=numbers)
                name_axis(ax, self.axis, levels)
                ax.set_title(cell_label(part))
            axes[0].set_ylabel(readable_name(metric))
            self.legend(figure, axes)
        return figure

    def line(self, ax: Axes, metric: str, chosen: dict[str, str], level: str, offset: float, *, joined: bool) -> None:
        """Draw means with intervals, a dot for each seed, and marks for runs that diverged or never met a bound."""
        look = self.style(level) if self.colour else {"color": COLOURS[0], "marker": "o"}
        x, centre, low, high = [], [], [], []
        for i, step in enumerate(self.levels(self.axis)):
            group = self.runs(**chosen, **({self.axis: step} if self.axis else {}))
            values = statistics.finite_values(group[group["status"] == "finished"][metric])
            if len(values):
                interval = statistics.t_interval(values)
                x.append(i + offset)
                centre.append(statistics.mean(values))
                low.append(interval[0])
                high.append(interval[1])
                ax.plot(
                    [i + offset] * len(values), values, ".", color=look["color"], alpha=0.35, markersize=3, zorder=2
                )
            if lost := int((group["status"] == "diverged").sum()):
                self.mark(ax, f"∞{lost}", i + offset, 0.02, look["color"])
            if is_until_metric(metric) and (never := statistics.num_without_value(group, metric)):
                self.mark(ax, f"never {never}", i + offset, 0.09, look["color"])
        if joined:
            ax.plot(x, centre, label=level, zorder=3, **look)
            ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        elif x:
            errors = np.nan_to_num([np.subtract(centre, low), np.subtract(high, centre)])
            ax.errorbar(x, centre, errors, label=level, linestyle="", capsize=2, elinewidth=1.1, zorder=3, **look)

    def mark(self, ax: Axes, text: str, x: float, height: float, colour: str) -> None:
        """Annotate runs without a value: ∞2 for two diverged runs."""
        ax.annotate(text, (x, height), xycoords=("data", "axes fraction"), color=colour, ha="center", size=7)

    def differences(self, compared: pd.DataFrame) -> Figure:
        """Draw each comparison's difference with its interval, a dot for each seed, and the verdict as colour."""
        metric, baseline = str(compared["metric"].iloc[0]), self.results.ablation.baseline
        factors = list(self.factors)
        looks = {"higher": COLOURS[0], "lower": COLOURS[1], "cannot tell": "#8A8A8A"}
        with figure_panels(1, width=4.6, height=0.9 + 0.26 * len(compared)) as (figure, [ax]):
            groups = {tuple(cell.values()): group for cell, group in statistics.by_cell(self.results.runs, factors)}
            for i, (_, row) in enumerate(compared.iterrows()):
                cell = {factor: row[factor] for factor in factors}
                reference = groups[tuple({**cell, **baseline}.values())]
                dots = statistics.paired_differences(groups[tuple(cell.values())], reference, metric)
                colour = looks[row["verdict"]]
                ax.plot(dots, [i] * len(dots), "o", color=colour, alpha=0.3, markersize=3)
                ax.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=1.6)
                ax.plot(
                    row["difference"], i, "D" if row["verdict"] != "cannot tell" else "o", color=colour, markersize=5
                )
            ax.axvline(0, color="black", linewidth=0.8)
            ax.set_yticks(
                range(len(compared)), [cell_label({f: row[f] for f in self.shown}) for _, row in compared.iterrows()]
            )
            ax.invert_yaxis()
            ax.grid(visible=False, axis="y")
            ax.set_xlabel(f"{readable_name(metric)}, difference to {cell_label(baseline)}")
            for verdict in [verdict for verdict in looks if verdict in set(compared["verdict"])]:
                ax.plot([], [], "D" if verdict != "cannot tell" else "o", color=looks[verdict], label=verdict)
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure

    def curves(self, column: str) -> Figure:
        """Draw a column of metrics.csv over the steps: means over seeds with bands, a line for each level."""
        colour = self.colour or self.axis
        parts = self.parts([factor for factor in self.shown if factor != colour])
        drawn = 0.0, math.inf
        bands: list[tuple[Axes, str, pd.DataFrame]] = []
        with figure_panels(len(parts)) as (figure, axes):
            for part, ax in zip(parts, axes, strict=True):
                for level in self.levels(colour):
                    chosen = self.runs(**part, **({colour: level} if colour else {}))
                    found = [self.results.curves[f] for f in chosen["folder"] if f in self.results.curves]
                    series = [
                        curve[np.isfinite(curve[column].astype(float))].groupby("step")[column].last()
                        for curve in found
                        if column in curve
                    ]
                    if not series:
                        continue
                    table = pd.concat(series, axis=1).sort_index()
                    middle, spread, n = table.mean(axis=1), table.std(axis=1, ddof=1), table.count(axis=1)
                    half = spread / np.sqrt(n) * [statistics.stats.t.ppf(0.975, max(int(k) - 1, 1)) for k in n]
                    shade = self.style(level, colour)["color"] if colour else COLOURS[0]
                    ax.plot(middle.index, middle, "o-" if len(middle) == 1 else "-", color=shade, label=level)
                    band = {"low": middle - half, "high": middle + half, "least": table.min(axis=1) * 0.5}
                    bands.append((ax, shade, pd.DataFrame(band)))
                    drawn = max(drawn[0], float(middle.max())), min(drawn[1], float(middle.min()))
                ax.set_title(cell_label(part))
                ax.set_xlabel("step")
            logarithmic = drawn[1] > 0 and drawn[0] > 20 * drawn[1]
            for ax, shade, band in bands:  # a logarithmic axis needs positive lower ends
                low = band["low"].clip(lower=band["least"]) if logarithmic else band["low"]
                ax.fill_between(band.index, low, band["high"], color=shade, alpha=0.15, linewidth=0)
            if logarithmic:
                for ax in axes:
                    ax.set_yscale("log")
            axes[0].set_ylabel(readable_name(column))
            self.legend(figure, axes, colour)
        return figure

    def heat_map(self, metric: str) -> Figure:
        """Draw the mean of each cell over two factors, hatched if all runs of a cell diverged or failed."""
        across = self.axis
        down = next(factor for factor in [self.colour, *self.shown] if factor not in (None, across))
        assert across is not None
        assert down is not None
        rows, columns = self.levels(down), self.levels(across)
        means = np.array(
            [
                [
                    statistics.mean(statistics.finite_values(self.runs(**{down: row, across: column})[metric]))
                    for column in columns
                ]
                for row in rows
            ]
        )
        size = 0.62 * len(columns) + 1.6, 0.36 * len(rows) + 0.9
        with figure_panels(1, width=size[0], height=size[1]) as (figure, [ax]):
            ax.imshow(means, cmap="cividis", aspect="auto")
            measured = means[~np.isnan(means)]
            low, high = measured.min(initial=math.inf), measured.max(initial=-math.inf)
            for i, j in product(range(len(rows)), range(len(columns))):
                if np.isnan(means[i, j]):
                    ax.add_patch(mpl.patches.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", linewidth=0))
                    continue
                dark = (means[i, j] - low) / (high - low or 1) < 0.5
                ax.text(
                    j, i, f"{means[i, j]:.3g}", ha="center", va="center", color="white" if dark else "black", size=8
                )
            ax.set_xticks(
                range(len(columns)),
                columns,
                rotation=0 if max(map(len, columns)) < 8 else 30,
                ha="center" if max(map(len, columns)) < 8 else "right",
            )
            ax.set_yticks(range(len(rows)), rows)
            ax.set_xlabel(readable_name(across))
            ax.set_title(readable_name(metric))
            ax.grid(visible=False)
            ax.spines[:].set_visible(False)
        return figure

    def tuning(self) -> Figure:
        """Draw the validation score over the tuned key, a line for each cell, with a ring at the chosen value."""
        tuning, chosen = self.results.tuning, self.results.chosen
        assert tuning is not None
        assert chosen is not None
        colour = self.colour or self.axis
        parts = self.parts([factor for factor in self.shown if factor != colour])
        with figure_panels(len(parts)) as (figure, axes):
            for part, ax in zip(parts, axes, strict=True):
                for level in self.levels(colour):
                    cell = {**part, **({colour: level} if colour else {})}
                    rows, best = tuning, chosen
                    for factor, one in cell.items():
                        rows, best = rows[rows[factor] == one], best[best[factor] == one]
                    look = self.style(level, colour) if colour else {"color": COLOURS[0], "marker": "o"}
                    means = rows.groupby("value")["score"].agg(lambda scores: scores.mean(skipna=False))
                    diverged = rows[rows["status"] == "diverged"].groupby("value").size()
                    for value, lost in diverged.items():
                        height = 0.02 + 0.06 * self.levels(colour).index(level)
                        self.mark(ax, f"∞{lost}", float(value), height, look["color"])
                    ax.plot(rows["value"], rows["score"], ".", color=look["color"], alpha=0.35, markersize=3)
                    ax.plot(means.index, means, label=level, **look)
                    if len(best) and not math.isnan(means.get(best["value"].iloc[0], math.nan)):
                        value = best["value"].iloc[0]
                        ax.plot(value, means[value], "o", markersize=10, fillstyle="none", color=look["color"])
                ax.set_xscale("log")
                ax.set_title(cell_label(part))
                ax.set_xlabel(readable_name(self.results.tuned_key))
            axes[0].set_ylabel(readable_name(self.results.tuning_metric))
            self.legend(figure, axes, colour)
        return figure

    def legend(self, figure: Figure, axes: Sequence[Axes], factor: str | None = None) -> None:
        """Draw one legend for all panels, beside the last."""
        factor = factor or self.colour
        handles: dict[str, Any] = {}
        for ax in axes:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if factor is not None and handles:
            more = max(map(len, handles)) - LEGEND_LETTERS  # keeps the width of the panels
            figure.set_figwidth(figure.get_figwidth() + LETTER_INCHES * max(0, more))
            last = axes[min(len(axes), num_columns(len(axes))) - 1]
            last.legend(
                handles.values(),
                handles.keys(),
                title=readable_name(factor),
                loc="upper left",
                bbox_to_anchor=(1.0, 1.0),
            )


@contextmanager
def figure_panels(
    number: int, width: float = PANEL[0], height: float = PANEL[1]
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Create a figure with a number of panels in the common style."""
    columns = num_columns(number)
    rows = math.ceil(number / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * columns + LEGEND, height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for ax in grid.flat[number:]:
            ax.set_visible(False)
        yield figure, list(grid.flat[:number])
        for ax in figure.axes:
            keep_as_text(ax)


def keep_as_text(ax: Axes) -> None:
    """Disable math text for names with a $, and replace control characters, which SVG cannot contain."""
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
    if (legend := ax.get_legend()) is not None:
        texts += [legend.get_title(), *legend.get_texts()]
    for axis in (ax.xaxis, ax.yaxis):
        # levels; the powers of ten of other axes stay math text
        if isinstance(axis.get_major_formatter(), FixedFormatter):
            texts += axis.get_ticklabels()
    for text in texts:
        text.set_text("".join(sign if sign.isprintable() else " " for sign in text.get_text()))
        text.set_parse_math(False)


def num_columns(number: int) -> int:
    return min(number, 4 if number > 6 or number == 4 else 3)


def name_axis(ax: Axes, factor: str | None, levels: Sequence[str]) -> None:
    """Label the axis with levels at equal distances: powers of two and ten then look like a logarithmic axis."""
    crowded = sum(map(len, levels)) > 30
    ax.xaxis.set_major_locator(FixedLocator(range(len(levels))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(range(len(levels)), levels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    ax.set_xlim(-0.5, len(levels) - 0.5)
    if factor is not None:
        ax.set_xlabel(readable_name(factor))


def is_numeric(levels: Sequence[str]) -> bool:
    """Return whether all levels except "full" are numbers."""
    return len(levels) > 1 and all(is_number(level) for level in levels if level != "full")


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def readable_name(name: str) -> str:
    """Return a readable name of a key or metric: batch size for data.batch_size, validation loss for val/loss."""
    words = {"val/": "validation ", "test/": "test ", "train/": "training ", "lr": "learning rate"}
    text = last_part(name) if "." in name and "/" not in name and "(" not in name else name
    text = words.get(text, text)
    for key in ("val/", "test/", "train/"):
        text = text.replace(key, words[key])
    return text.replace("_", " ")


def cell_label(cell: dict[str, str]) -> str:
    """Return a cell, or a part of one, as a title."""
    return ", ".join(
        f"{readable_name(factor)} {level}" if is_number(level) or level in GENERIC_LEVELS else level
        for factor, level in cell.items()
    )


def file_name(metric: str) -> str:
    """Return a metric as a file name."""
    return "_".join("".join(sign if sign.isalnum() else " " for sign in metric).split())
