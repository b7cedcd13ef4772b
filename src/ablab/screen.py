"""Standard output and error: a terminal, which has a width and moves; a file or a pipe, plain; or nowhere."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO


class Lossy(io.FileIO):
    """A standard stream that drops what cannot be written, from the first failure on.

    The reader of a pipe may leave (`| head`), a disk may be full, a terminal may be closed. The descriptor then leads
    to /dev/null, for libraries, worker processes and Python's last flush as well.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            lose(self.fileno(), error)
            return len(data)


def lose(descriptor: int, error: OSError) -> None:
    """Send what is written to a standard stream nowhere, and say so once on stderr, if that is still there."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    if descriptor == 1:
        with suppress(OSError):
            os.write(2, f"warning: stdout: {error.strerror}; nothing more is printed there\n".encode())


def keep_going_without_streams() -> None:
    """Have a program go on where its standard output or error is closed, full, or no longer read.

    Streams that somebody has redirected in Python (a notebook, a test) stay as they are.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by whoever has started this: the next file would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if descriptor:
                setattr(sys, ("stdout", "stderr")[descriptor - 1], opened(descriptor, "utf-8", line_buffering=True))
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        is_unbuffered = raw is buffer  # python -u
        if type(raw) is not io.FileIO or raw.fileno() != descriptor:
            continue
        try:
            stream.flush()
        except OSError as error:
            lose(descriptor, error)
        setattr(sys, name, opened(descriptor, stream.encoding, line_buffering=stream.line_buffering or is_unbuffered))


def opened(descriptor: int, encoding: str, *, line_buffering: bool) -> io.TextIOWrapper:
    """A standard stream, as Python opens it, that drops what it cannot write or encode."""
    raw = Lossy(descriptor, "w", closefd=False)
    # stderr as Python has it: a word that is printed is there, whatever happens next
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=line_buffering or descriptor == 2
    )


def watched() -> bool:
    """Whether what is printed is seen as it moves, on a terminal that can go back in a line."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def print_utf8() -> None:
    """Print UTF-8 whatever the locale is, and a file's name that is not UTF-8 as the bytes that it has."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


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
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield stdout
