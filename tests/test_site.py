"""The site of docs/: it builds without a warning, every link leads somewhere, and a browser shows it at any width."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from tests.polling import LIMIT

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


class Links(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.anchors.add(str(value))
            elif name in ("href", "src"):
                self.targets.append(str(value))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    missing = [name for name in ("sphinx", "furo", "myst_parser") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    [line] = re.findall(r"^\t\$\(RUN\) (-m sphinx .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = line.replace("build/docs", str(folder)).split()
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return folder


@pytest.fixture(scope="session")
def links(site: Path) -> dict[Path, Links]:
    return {page: Links(page) for page in site.rglob("*.html")}


def test_every_page_is_in_it(site: Path) -> None:
    assert all((site / f"{page.stem}.html").exists() for page in PAGES)


def test_every_link_within_it_leads_to_a_place(links: dict[Path, Links], site: Path) -> None:
    lost = []
    for page, found in links.items():
        for target in found.targets:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            place = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = links[place].anchors if place in links else set()
            if not place.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                lost.append(f"{page.relative_to(site)}: {target}")
    assert not lost


def test_every_link_out_of_it_is_https(links: dict[Path, Links]) -> None:
    for page, found in links.items():
        for target in found.targets:
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.scheme == "https", f"{page}: {target}"
                assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), f"{page}: {target}"
                assert not re.search(r"\s", target), f"{page}: {target}"


def github_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = [re.sub(r"[`*]|\]\(.*?\)|\[", "", line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_link_to_a_heading_leads_there_on_github_too(page: Path) -> None:
    for place, anchor in re.findall(r"\]\(([\w./-]*)#([^)\s]+)\)", page.read_text()):
        assert anchor in github_anchors(page.parent / place if place else page), f"{place}#{anchor}"


def test_what_is_imported_from_ablab_norms_is_in_the_reference(site: Path) -> None:
    from ablab import norms

    anchors = Links(site / "api" / "norms.html").anchors
    assert {f"ablab.norms.{name}" for name in norms.__all__} - {"ablab.norms.Layout"} <= anchors


@pytest.mark.parametrize("package", ["models", "tasks", "data", "optim"])
def test_every_module_is_in_the_reference(site: Path, package: str) -> None:
    anchors = Links(site / "api" / f"{package}.html").anchors
    modules = {path.stem for path in (ROOT / "src" / "ablab" / package).glob("[!_]*.py")}
    assert {f"module-ablab.{package}.{name}" for name in modules} <= anchors


@pytest.mark.slow
@pytest.mark.parametrize("width", [pytest.param(1280, marks=pytest.mark.thorough), 390])
def test_a_browser_shows_every_page_without_an_error_and_without_scrolling_sideways(
    site: Path, browser: Any, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(LIMIT * 1000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    for file in sorted(site.rglob("*.html")):
        page.goto(file.as_uri())
        wide = "[...document.querySelectorAll('html, .content')].filter(e => e.scrollWidth > e.clientWidth).length"
        if page.evaluate(wide):
            wrong.append("it scrolls sideways")
        assert not wrong, file.relative_to(site)
