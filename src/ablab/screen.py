"""Where what is printed goes: to a terminal, which has a width and moves; to a file or a pipe, plain; or nowhere."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO


def watched() -> bool:
    """Whether what is printed is seen as it moves, on a terminal that can go back in a line."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def fitted(text: str, stream: TextIO) -> str:
    """A text as a terminal can show it without cutting words; as it is where the stream is none."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
            break_long_words=False,  # of paths and commands, which are copied
            break_on_hyphens=False,
        )
        if len(line) > width
        else line
        for line in text.split("\n")
    )


@contextmanager
def hush(quiet: bool) -> Iterator[TextIO]:
    """Print nothing within, if so asked; warnings and errors, which are not for stdout, are seen.

    Gives what is printed to otherwise, for what is to be seen all the same.
    """
    stdout = sys.stdout
    if not quiet:
        yield stdout
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield stdout
