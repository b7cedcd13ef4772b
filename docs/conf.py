"""The site of docs/: `make docs` builds it into build/docs. The pages are the Markdown that GitHub shows, unchanged."""

from __future__ import annotations

import importlib
import pkgutil
import re

from sphinx.application import Sphinx

import ablab

project = "ablab"
release = version = ablab.__version__
html_title = "ablab"
html_theme = "furo"
pygments_dark_style = "github-dark"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
html_show_sphinx = False
html_use_index = html_domain_indices = False  # the search finds what they list
html_copy_source = False
html_static_path = ["site"]
html_css_files = ["site.css"]

highlight_language = "text"  # of blocks that name none
myst_heading_anchors = 3  # page.md#a-heading, as on GitHub
default_role = "code"  # docstrings have `single` quotes around code
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 100
napoleon_custom_sections = ["Shape"]


def contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Write the site's contents from the lists of links in index.md: a page is added there and nowhere else."""
    if page == "index":
        for heading, section in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", source[0], re.MULTILINE | re.DOTALL):
            pages = "\n".join(re.findall(r"^- \[.+?\]\(([\w/-]+)\.(?:md|rst)\)", section, re.MULTILINE))
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{pages}\n```\n" * bool(pages)


def modules(app: Sphinx, page: str, source: list[str]) -> None:
    """Document a package by what it exports, or else module by module: a new file needs no line in docs/api."""
    if page.startswith("api/"):
        package = importlib.import_module(f"ablab.{page.removeprefix('api/')}")
        inside = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        names = [] if hasattr(package, "__all__") else sorted(module.name for module in inside)
        for name in (package.__name__, *names):
            heading = f"\n{name}\n{'-' * len(name)}\n" if names and name != package.__name__ else ""
            source[0] += f"{heading}\n.. automodule:: {name}\n   :members:\n   :show-inheritance:\n"


def references(app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Each paper of a docstring on a line of its own."""
    within = False
    for i, line in enumerate(lines):
        if within and line.strip():
            lines[i] = re.sub(r"^(\s*)", r"\1- ", line)
        within = line.strip() == "References:" or (within and bool(line.strip()))


def setup(app: Sphinx) -> None:
    app.connect("source-read", contents)
    app.connect("source-read", modules)
    app.connect("autodoc-process-docstring", references, priority=100)  # before napoleon
