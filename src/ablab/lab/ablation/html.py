"""Render a report as a single self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ablab.lab.ablation.report import Report, Table

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 1rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.question { font-size: 1.1rem; margin: .25rem 0 1rem; } .soft { opacity: .75; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; background: white; border-radius: 4px; padding: .5rem; box-sizing: border-box; }
figcaption { font-size: .85rem; opacity: .75; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom-width: 2px; }
.higher { color: #0072B2; font-weight: 600; } .lower { color: #D55E00; font-weight: 600; } .cannot { opacity: .65; }
@media (prefers-color-scheme: dark) { .higher { color: #56B4E9; } .lower { color: #F0975A; } }
.warning { border-left: 4px solid #D55E00; padding-left: .75rem; }
@media print { figure, tr { break-inside: avoid; } }
"""


def render_page(report: Report, svg: Mapping[str, str], how_to_read: str) -> str:
    """Return the page, with its figures inlined."""
    parts = [f"<h1>{escape(report.title)}</h1>", f'<p class="question">{escape(report.question)}</p>']
    parts += [f"<p>{escape(fact)}</p>" for fact in report.facts]
    if report.verdicts:
        parts += ["<h2>Verdict</h2>", html_list(report.verdicts)]
    pictures = [
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{base64_text(svg[name])}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in report.figures
    ]
    parts += ['<div class="figures">', *pictures, "</div>"]
    parts += [html_table(table) for table in report.tables]
    parts += ["<h2>How to read it</h2>", f"<p>{escape(how_to_read)}</p>"]
    for title, entries in (("Runs without a result", report.troubles), ("Notes", report.notes)):
        if entries:
            parts += [f"<h2>{title}</h2>", html_list(entries)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.title)}</title>\n<style>{STYLE}</style>",
            *parts,
            "</html>\n",
        ]
    )


def base64_text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def html_list(entries: list[str]) -> str:
    lines = [f"<li{' class=warning' if entry.startswith('WARNING') else ''}>{escape(entry)}</li>" for entry in entries]
    return "\n".join(["<ul>", *lines, "</ul>"])


def html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = ["<tr>" + "".join(map(html_cell, row)) + "</tr>" for row in table.rows]
    return "\n".join(
        [
            f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>',
            *rows,
            "</tbody></table></div>",
        ]
    )


def html_cell(entry: str) -> str:
    verdict = next((word for word in ("higher", "lower", "cannot") if entry.startswith(word)), None)
    return f"<td{f' class={verdict}' if verdict else ''}>{escape(entry)}</td>"
