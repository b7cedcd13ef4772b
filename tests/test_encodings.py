"""Text is UTF-8 in any locale: every call that reads or writes text names the encoding."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "train.py", *sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]
PROCESSES = ("run", "Popen", "check_output")  # of subprocess


def calls_without_encoding(source: str) -> Iterator[ast.Call]:
    """Yield the calls that take the encoding from the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        words = {word.arg: word.value for word in node.keywords}
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        values = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]
        mode = getattr(words.get("mode"), "value", None)
        if name in ("read_text", "write_text"):
            found = len(node.args) <= (name == "write_text")  # another argument is the encoding, or a package's file
        elif name in ("open", "fdopen") and (isinstance(node.func, ast.Name) or name == "fdopen"):
            found = "b" not in (mode or [*values, "", ""][1] or "")
        elif name == "open":  # of a path: what else has an open is given a file
            mode = mode or [*values, ""][0]
            found = (not node.args or mode is not None) and set(mode or "r") <= set("rwxat+")
        elif name in PROCESSES:
            found = {"text", "universal_newlines"} & words.keys() != set()
        else:
            found = False
        if found:
            yield node


@pytest.mark.parametrize("file", FILES, ids=[file.relative_to(ROOT).as_posix() for file in FILES])
def test_text_is_read_and_written_as_utf8(file: Path) -> None:
    lines = [node.lineno for node in calls_without_encoding(file.read_text(encoding="utf-8"))]
    assert lines == [], f'{file}: encoding="utf-8" is missing in lines {lines}'


def test_what_is_printed_is_utf8_in_the_c_locale(command: Callable[..., Any]) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = command("-m", "norm=batchnorm,none", "seed=0", "logger=csv", "trainer.max_epochs=-5", **locale)
    assert done.returncode == 2, done.stderr
    assert "2 cells × 1 seeds, 2 runs" in done.stdout


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("p.read_text()", 1),
        ("p.read_text(errors='replace')", 1),
        ("p.read_text(encoding='utf-8')", 0),
        ("p.write_text(t)", 1),
        ("p.write_text(t, 'utf-8')", 0),
        ("package.read_text('METADATA')", 0),
        ("open(p)", 1),
        ("open(p, 'w', newline='')", 1),
        ("open(p, mode='rb')", 0),
        ("open(p, 'wb')", 0),
        ("p.open()", 1),
        ("p.open('a')", 1),
        ("p.open(mode='w')", 1),
        ("p.open('rb+')", 0),
        ("Image.open(p)", 0),
        ("os.open(p, os.O_RDONLY)", 0),
        ("os.fdopen(3, 'w')", 1),
        ("subprocess.run(w, text=True)", 1),
        ("subprocess.run(w, capture_output=True)", 0),
        ("subprocess.run(w, text=True, encoding='utf-8')", 0),
        ("call(**words)", 0),
    ],
)
def test_a_call_that_takes_the_encoding_from_the_locale_is_found(source: str, number: int) -> None:
    assert len([*calls_without_encoding(source)]) == number
