"""An ablation's report: runs, conclusions, tables and figures; for a terminal, a paper and a browser."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ablab.errors import ConfigError
from ablab.lab.ablation import statistics
from ablab.lab.ablation.figures import STYLE, cell_label, figures, readable_name
from ablab.lab.ablation.html import render_page
from ablab.lab.ablation.metrics import is_until_metric
from ablab.lab.ablation.results import Results, replace_text
from ablab.lab.run.folder import relpath
from ablab.screen import is_interactive

FOLDER = "report"
UNPAIRED_MARK = "†"  # marks a verdict based on some of the seeds
HOW_TO_READ = (
    "Differences are paired: a difference is the mean, over the seeds, of a cell's metric minus that of the baseline "
    "with the same seed, which started from the same weights and saw the same samples. Intervals are 95 % confidence "
    "intervals of a single comparison. A verdict requires p < 0.05 in a paired t-test, after Holm's correction for all "
    "comparisons in the table. Otherwise the result is inconclusive, and the table shows the number of seeds needed to "
    "detect a difference of the observed size with 80 % power."
)


@dataclass
class Table:
    """Rows of text under a title; the first column holds names, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Report:
    """The content of a report, in reading order."""

    title: str
    question: str
    facts: list[str]
    verdicts: list[str]
    tables: list[Table]
    troubles: list[str]
    notes: list[str]
    figures: list[tuple[str, str]] = field(default_factory=list)  # file name and caption


def compose_report(results: Results) -> Report:
    """Compose the report of an ablation's results.

    Raises:
        ConfigError: no run has finished.
    """
    ablation, runs = results.ablation, results.runs
    if len(runs) == 0 and results.tuning is not None:
        raise ConfigError(
            f"{ablation.name}: its tuning is not complete ({count_statuses(results.tuning)}); the ablation's command "
            "goes on with it; there is no report yet"
        )
    finished = runs["status"] == "finished"
    if not finished.any():
        raise ConfigError(
            f"{ablation.name}: none of its {len(runs)} runs has finished ({count_statuses(runs)}); there is no report "
            "yet"
        )
    factors = list(ablation.factors)
    cells = statistics.cells(runs, factors, ablation.metrics)
    facts = [f"{int(finished.sum())} of {len(runs)} runs finished: {describe_grid(results)}."]
    for status in ("diverged", "failed", "stopped", "running", "missing"):
        if number := int((runs["status"] == status).sum()):
            facts.append(f"{number} {status}: {', '.join(first_labels(runs[runs['status'] == status], factors))}.")
    tables, verdicts = [cell_table(results, cells, metric) for metric in ablation.metrics], []
    marked = False
    for metric in reversed(ablation.metrics):
        compared = statistics.comparisons(runs, factors, ablation.baseline, metric)
        if len(compared) == 0:
            continue
        tables.insert(0 if metric == ablation.metrics[0] else 1, comparison_table(results, compared, metric))
        marked = marked or bool(compared["lost"].any())
        if metric == ablation.metrics[0]:
            verdicts = summary(compared, metric) + [verdict_sentence(results, row) for _, row in compared.iterrows()]
    troubles = [
        f"{cell_label({f: row[f] for f in factors})}, seed {row['seed']}: {row['error'] or row['status']} "
        f"({relpath(Path(row['folder']))})"
        for _, row in runs[~finished & (runs["status"] != "missing")].iterrows()
    ]
    notes = [*tuning_notes(results), *results.notes]
    if marked:
        notes.append(
            f"{UNPAIRED_MARK} Some seeds have no pair, because a run diverged, failed or never got there: what is said "
            "holds for the other seeds, and would not where the level itself is why runs were lost."
        )
    if ablation.baseline and (alone := statistics.num_without_baseline(runs, factors, ablation.baseline)):
        notes.append(f"{alone} cells have no baseline, which is excluded: they are compared with nothing.")
    if not ablation.baseline:
        notes.append("The ablation names no baseline: nothing is compared.")
    return Report(ablation.name, ablation.question, facts, verdicts, tables, troubles, notes)


def count_statuses(runs: pd.DataFrame) -> str:
    """Return the number of runs of each status."""
    return ", ".join(f"{number} {status}" for status, number in runs["status"].value_counts().items())


def describe_grid(results: Results) -> str:
    """Describe the grid."""
    parts = [f"{len(levels)} of {readable_name(factor)}" for factor, levels in results.ablation.factors.items()]
    return " × ".join([*parts, f"{len(results.ablation.seeds)} seeds"])


def first_labels(runs: pd.DataFrame, factors: list[str]) -> Iterator[str]:
    """Yield the labels of the first few runs."""
    for _, row in runs.head(4).iterrows():
        yield f"{cell_label({f: row[f] for f in factors})}, seed {row['seed']}".lstrip(", ")
    if len(runs) > 4:
        yield "…"


def summary(compared: pd.DataFrame, metric: str) -> list[str]:
    """Return the number of verdicts of each kind."""
    counts = compared["verdict"].value_counts()
    parts = [f"{counts[verdict]} {verdict}" for verdict in ("higher", "lower", "cannot tell") if verdict in counts]
    return [f"{readable_name(metric)}, {len(compared)} comparisons: {', '.join(parts)}."]


def verdict_sentence(results: Results, row: pd.Series) -> str:
    """Return the conclusion of one comparison."""
    n = int(row["n"])
    subject = f"{comparison_label(results, row)}: "
    lost = unpaired_seeds_text(results, row)
    if n < 2:
        return f"{subject}cannot tell with n = {n}{lost}"
    if math.isnan(row["p"]):
        found = f"{row['difference']:+.3g}".replace("-", "−")
        return (
            f"{subject}{found}, cannot tell with n = {n}: every pair differs by the same amount, so there is no spread "
            f"to judge by{lost}"
        )
    digits = num_decimals(row["sd"] / math.sqrt(n))
    low, high = format_signed(row["low"], digits), format_signed(row["high"], digits)
    found = f"{format_signed(row['difference'], digits)} [{low}, {high}]"
    if row["verdict"] != "cannot tell":
        return f"{subject}{found}, {format_verdict(row)} (Holm p = {row['holm']:.2g}, n = {n}){lost}"
    detectable = f"; {n} seeds tell a difference of {row['tells']:.2g} and more" if math.isfinite(row["tells"]) else ""
    return f"{subject}{found}, cannot tell with n = {n}{seeds_needed_text(row)}{detectable}{lost}"


def unpaired_seeds_text(results: Results, row: pd.Series) -> str:
    """Return the number of seeds without a pair, and of runs of both cells that never met a bound."""
    if not row["lost"]:
        return ""
    seeds, never = len(results.ablation.seeds), ""
    if is_until_metric(row["metric"]):
        never = f" (never in {row['none']:.0f} of {seeds}, against {row['baseline_none']:.0f} of {seeds})"
    return f"; seeds without a pair: {row['lost']:.0f}{never}"


def format_verdict(row: pd.Series) -> str:
    """Return a verdict, with a mark if it is based on some of the seeds."""
    return f"{row['verdict']} {UNPAIRED_MARK}" if row["lost"] else str(row["verdict"])


def seeds_needed_text(row: pd.Series) -> str:
    """Return the number of seeds needed to detect the observed difference."""
    if math.isnan(row["seeds_needed"]):
        return ""
    many = f"about {row['seeds_needed']:.0f}" if math.isfinite(row["seeds_needed"]) else "more than 10,000"
    return f"; {many} seeds would tell a difference like this"


def comparison_label(results: Results, row: pd.Series) -> str:
    """Return the name of a comparison: cell against baseline."""
    baseline = results.ablation.baseline
    changed = {f: row[f] for f in results.ablation.factors if f in baseline and row[f] != baseline[f]}
    same = {f: row[f] for f in results.ablation.factors if f not in changed and len(results.ablation.factors[f]) > 1}
    where = f" at {cell_label(same)}" if same else ""
    return f"{cell_label(changed)} against {cell_label({f: baseline[f] for f in changed})}{where}"


def comparison_table(results: Results, compared: pd.DataFrame, metric: str) -> Table:
    lost = bool(compared["lost"].any())
    header = ["cell", "n", "difference", "95 % interval", "by bootstrap", "effect", "Holm p"]
    header += [*(["lost"] if lost else []), "verdict"]
    factors = [f for f, levels in results.ablation.factors.items() if len(levels) > 1]
    rows = []
    for _, row in compared.iterrows():
        digits = num_decimals(row["sd"] / math.sqrt(row["n"])) if row["n"] > 1 else 3
        seeds = f" ({row['seeds_needed']:.0f} seeds would)" if math.isfinite(row["seeds_needed"]) else ""
        rows.append(
            [
                cell_label({f: row[f] for f in factors}),
                f"{row['n']:.0f}",
                format_signed(row["difference"], digits),
                format_interval(row["low"], row["high"], digits),
                format_interval(row["boot_low"], row["boot_high"], digits),
                "" if math.isnan(row["effect"]) else f"{row['effect']:+.2g}".replace("-", "−"),
                "" if math.isnan(row["holm"]) else f"{row['holm']:.2g}",
                *([f"{row['lost']:.0f}"] if lost else []),
                format_verdict(row) + (seeds if row["verdict"] == "cannot tell" else ""),
            ]
        )
    return Table(f"{readable_name(metric)}: differences to {cell_label(results.ablation.baseline)}", header, rows)


def cell_table(results: Results, cells: pd.DataFrame, metric: str) -> Table:
    """Return a table of mean ± standard deviation (n) per cell, with the largest factor that fits as columns."""
    factors = [f for f, levels in results.ablation.factors.items() if len(levels) > 1]
    of_metric = cells[cells["metric"] == metric]
    across = max(factors[1:], key=lambda f: len(results.ablation.factors[f]), default=None)
    if across is not None and len(results.ablation.factors[across]) > 8:
        across = None
    down = [factor for factor in factors if factor != across]
    title = f"{readable_name(metric)}: mean ± standard deviation (n)"
    if across is None:
        rows = [
            [cell_label({f: row[f] for f in factors}) or "all", format_cell(row)] for _, row in of_metric.iterrows()
        ]
        return Table(title, [", ".join(map(readable_name, factors)), readable_name(metric)], rows)
    levels = results.ablation.factors[across]
    header = [f"{', '.join(map(readable_name, down))} \\ {readable_name(across)}", *levels]
    rows = []
    for cell, group in statistics.by_cell(of_metric, down):
        found = {row[across]: format_cell(row) for _, row in group.iterrows()}
        rows.append([cell_label(cell), *(found.get(level, "") for level in levels)])
    return Table(title, header, rows)


def format_cell(row: pd.Series) -> str:
    """Return a cell's mean and spread, and the number of runs without a value."""
    parts = [f"{row[status]:.0f} {status}" for status in ("diverged", "failed") if row[status]]
    never = "never" if is_until_metric(row["metric"]) else "without a value"
    parts += [f"{row['none']:.0f} {never}"] if row["none"] else []
    parts += [f"{row['missing']:.0f} to come"] if row["missing"] else []
    if row["n"] == 0:
        return ", ".join(parts) or "none"
    digits = num_decimals(row["sd"] if row["n"] > 1 and row["sd"] > 0 else abs(row["mean"]) / 100)
    spread = f" ± {format_number(row['sd'], digits)}" if row["n"] > 1 else ""
    counts = ", ".join([f"{row['n']:.0f}", *parts])
    return f"{format_number(row['mean'], digits)}{spread} ({counts})"


def num_decimals(size: float) -> int:
    """Return the number of decimals that shows the first two digits of a number."""
    return max(0, 1 - math.floor(math.log10(size))) if size > 0 and math.isfinite(size) else 3


def format_signed(number: float, digits: int) -> str:
    return format_number(number, digits, sign="+") if math.isfinite(number) else ""


def format_number(number: float, digits: int, sign: str = "") -> str:
    """Return a number with fixed decimals; a small one with many decimals in scientific notation."""
    if digits <= 6 or abs(number) >= 1e-3:
        return f"{number:{sign}.{digits}f}".replace("-", "−")
    figures = digits + math.floor(math.log10(abs(number))) if number else 0
    return f"{number:{sign}.{max(0, figures)}e}".replace("-", "−")


def format_interval(low: float, high: float, digits: int) -> str:
    return f"[{format_signed(low, digits)}, {format_signed(high, digits)}]" if math.isfinite(low) else ""


def tuning_notes(results: Results) -> list[str]:
    """Return notes on the chosen value of each cell, with a warning for values at the edge of the grid."""
    if results.chosen is None:
        return []
    factors = list(results.ablation.factors)
    key, grid = readable_name(results.tuned_key), results.tuning_grid
    tried = ", ".join(f"{value:g}" for value in grid)
    got = [f"{cell_label({f: row[f] for f in factors})} {row['value']:g}" for _, row in results.chosen.iterrows()]
    metric = readable_name(results.tuning_metric)
    notes = [f"Each cell has its own {key}, the best of {tried} by {metric}: {'; '.join(got)}."]
    if results.tuning is not None and set(results.tuning["status"]) != {"finished"}:
        notes.append(f"Not all of the {len(results.tuning)} tuning runs ended well: {count_statuses(results.tuning)}.")
    for _, row in results.chosen.iterrows():
        tried_here = results.tuning if results.tuning is not None else pd.DataFrame({"score": []})
        for factor in factors:
            tried_here = tried_here[tried_here[factor] == row[factor]]
        cell = cell_label({f: row[f] for f in factors}) or "every run"
        if len(tried_here) and not tried_here["score"].notna().any():
            notes.append(
                f"WARNING: {cell}: no tuning run has a {metric}, so no {key} is known to be the best; "
                f"{row['value']:g}, the smallest, stands for it."
            )
        elif row["value"] in (grid[0], grid[-1]):
            end = "smallest" if row["value"] == grid[0] else "largest"
            notes.append(
                f"WARNING: {cell}: its best {key}, {row['value']:g}, is the {end} that "
                "was tried; widen ablation.tune.values, or the comparison is unfair to it."
            )
    return notes


# Where it goes ------------------------------------------------------------------------------------------------------


def write_report(results: Results, folder: Path) -> Report:
    """Write the report into `folder/report`, and return it.

    Raises:
        ConfigError: no run has finished.
    """
    report = compose_report(results)
    place = folder / FOLDER
    (place / "figures").mkdir(parents=True, exist_ok=True)
    svg = {}
    with mpl.rc_context(STYLE):
        for name, caption, figure in figures(results):
            for suffix in ("pdf", "png", "svg"):
                metadata = {"CreationDate": None} if suffix == "pdf" else {"Date": None} if suffix == "svg" else {}
                figure.savefig(place / "figures" / f"{name}.{suffix}", metadata=metadata)
            svg[name] = (place / "figures" / f"{name}.svg").read_text(encoding="utf-8")
            report.figures.append((name, caption))
    factors = list(results.ablation.factors)
    metrics = results.ablation.metrics
    compared = [statistics.comparisons(results.runs, factors, results.ablation.baseline, m) for m in metrics]
    replace_text(place / "runs.csv", results.runs.to_csv(index=False))
    replace_text(place / "cells.csv", statistics.cells(results.runs, factors, metrics).to_csv(index=False))
    replace_text(place / "comparisons.csv", pd.concat(compared).to_csv(index=False) if any(map(len, compared)) else "")
    replace_text(place / "report.md", markdown(report))
    replace_text(place / "tables.tex", "\n".join(latex(table) for table in report.tables))
    replace_text(place / "report.html", render_page(report, svg, HOW_TO_READ))
    return report


def markdown(report: Report) -> str:
    lines = [
        f"# {escape_markdown(report.title)}",
        "",
        escape_markdown(report.question),
        "",
        *map(escape_markdown, report.facts),
        "",
    ]
    if report.verdicts:
        lines += ["## Verdict", "", *(f"- {escape_markdown(verdict)}" for verdict in report.verdicts), ""]
    for name, caption in report.figures:
        lines += [f"![{escape_markdown(caption)}](figures/{name}.png)", f"*{escape_markdown(caption)}*", ""]
    for table in report.tables:
        header = " | ".join(map(escape_markdown, table.header))
        lines += [f"## {escape_markdown(table.title)}", "", f"| {header} |", "|" + "---|" * len(table.header)]
        lines += [f"| {' | '.join(map(escape_markdown, row))} |" for row in table.rows]
        lines.append("")
    lines += ["## How to read it", "", HOW_TO_READ, ""]
    for title, entries in (("Runs without a result", report.troubles), ("Notes", report.notes)):
        if entries:
            lines += [f"## {title}", "", *(f"- {escape_markdown(entry)}" for entry in entries), ""]
    return "\n".join(lines)


# Characters that could be Markdown markup; not the brackets of an interval or a _ within a word.
MARKDOWN = re.compile(
    r"[\\`*|$]|<(?=[A-Za-z/!?])|\](?=[(\[:])|(?<!\w)_|_(?!\w)|~(?=~)|&(?=#?\w+;)|^[#>+=-]|(?<=^\d)[.)](?=\s)"
)


def escape_markdown(text: str) -> str:
    """Return a text as one line of Markdown without markup."""
    return MARKDOWN.sub(r"\\\g<0>", one_line(text))


def one_line(text: str) -> str:
    """Return a text without line breaks and control characters."""
    return "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))


def latex(table: Table) -> str:
    """Return a table in LaTeX with booktabs rules."""
    columns = "l" + "r" * (len(table.header) - 1)
    # LaTeX would take a [ or * after a row for an argument of \\
    body = ["{}" * row[0].startswith(("[", "*")) + " & ".join(map(escape_latex, row)) + r" \\" for row in table.rows]
    return "\n".join(
        [
            f"% {one_line(table.title)}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(map(escape_latex, table.header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    """Return a text escaped for LaTeX."""
    signs = {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "_": r"\_",
        "#": r"\#",
        "$": r"\$",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
        "|": "$|$",
        "∞": r"$\infty$",
        "±": r"$\pm$",
        UNPAIRED_MARK: r"\dag{}",
        "−": "$-$",
    }
    return "".join(signs.get(sign, sign) for sign in one_line(text))


def print_report(report: Report, folder: Path, console: Console | None = None) -> None:
    """Print the report on a terminal, or as plain text elsewhere, with markup and emoji codes kept as text."""
    console = console or Console(highlight=False, soft_wrap=False, force_terminal=is_interactive())
    if not console.is_terminal or console.is_dumb_terminal:
        console = Console(file=console.file, highlight=False, width=140, force_terminal=False)
    console.print(Text.assemble("\n", (one_line(report.title), "bold"), f"  {one_line(report.question)}"))
    for fact in report.facts:
        console.print(Text(one_line(fact)))
    for table in report.tables[:2]:
        title = Text(one_line(table.title), style="table.title")
        shown = RichTable(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
        # keeps the table as wide as most screens
        kept = [i for i, name in enumerate(table.header) if name != "by bootstrap"]
        for i in kept:
            shown.add_column(Text(one_line(table.header[i])), justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*(colour_verdict(row[i]) for i in kept))
        console.print()
        console.print(shown)
    for note in [*report.notes, *report.troubles]:
        console.print(Text(one_line(note)))
    console.print(Text(f"\nreport: {relpath(folder / FOLDER / 'report.html')} (also .md, .csv, .tex, figures)"))


def colour_verdict(entry: str) -> Text:
    """Return a verdict in its colour."""
    colours = {"higher": "blue", "lower": "red", "cannot tell": "dim"}
    colour = next((colours[verdict] for verdict in colours if entry.startswith(verdict)), "")
    return Text(one_line(entry), style=colour)
