"""Render a report as a single self-contained HTML page, from the template report.html."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from ablab.lab.ablation.report import Report


def render_page(report: Report, svg: Mapping[str, str], how_to_read: str) -> str:
    """Return the page, with its figures inlined.

    Args:
        report: the facts, verdicts, tables and captions.
        svg: the figures, by name.
        how_to_read: an explanation of the tables.
    """
    loader = PackageLoader("ablab.lab.ablation", package_path="")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    templates.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return templates.get_template("report.html").render(
        report=report, svg=svg, how_to_read=how_to_read, verdict=verdict_of
    )


def verdict_of(entry: str) -> str | None:
    """Return the verdict with which a table's cell begins, for its color."""
    return next((word for word in ("higher", "lower", "cannot") if entry.startswith(word)), None)
