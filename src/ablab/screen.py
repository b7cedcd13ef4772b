"""Standard output and error on terminals, in files and pipes, or closed."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO


class LossyStream(io.FileIO):
    """A raw standard stream that is redirected to /dev/null at the first failed write.

    Writes fail if the reader of a pipe exits (`| head`), the disk is full or the terminal is closed. The redirection of
    the descriptor also covers libraries, worker processes and Python's flush at exit.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            redirect_to_devnull(self.fileno(), error)
            return len(data)


def redirect_to_devnull(descriptor: int, error: OSError) -> None:
    """Redirect a standard stream to /dev/null, and warn on stderr if stdout is lost."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, descriptor)
    os.close(devnull)
    if descriptor == 1:
        with suppress(OSError):
            os.write(2, f"warning: stdout: {error.strerror}; nothing more is printed there\n".encode())


def tolerate_broken_streams() -> None:
    """Let the program continue if its standard output or error is closed, full or no longer read.

    Streams that were redirected in Python (in notebooks or tests) are left alone.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the parent; the next opened file would get its descriptor, and all output
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, this one
            if descriptor:
                setattr(
                    sys, ("stdout", "stderr")[descriptor - 1], open_stream(descriptor, "utf-8", line_buffering=True)
                )
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
            redirect_to_devnull(descriptor, error)
        setattr(
            sys, name, open_stream(descriptor, stream.encoding, line_buffering=stream.line_buffering or is_unbuffered)
        )


def open_stream(descriptor: int, encoding: str, *, line_buffering: bool) -> io.TextIOWrapper:
    """Open a standard stream as Python does, but escape what it cannot encode, and drop output after a failed write."""
    raw = LossyStream(descriptor, "w", closefd=False)
    # stderr is line buffered, as in Python, so that messages survive a crash
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=line_buffering or descriptor == 2
    )


def is_interactive() -> bool:
    """Return whether stdout is a terminal that supports carriage returns, for progress bars."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def print_utf8() -> None:
    """Print UTF-8 in any locale, and file names that are not UTF-8 as their raw bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")


def wrap_to_terminal(text: str, stream: TextIO) -> str:
    """Wrap a text to the width of the terminal; return it unchanged if `stream` is not a terminal."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4),
            break_long_words=False,  # keep paths and commands whole, for copying
            break_on_hyphens=False,
        )
        if len(line) > width
        else line
        for line in text.split("\n")
    )


@contextmanager
def silence_stdout(quiet: bool) -> Iterator[TextIO]:
    """Silence stdout if `quiet`; stderr is not affected.

    Yields the real stdout, for output that is shown in any case.
    """
    stdout = sys.stdout
    if not quiet:
        yield stdout
        return
    with open(os.devnull, "w", encoding="utf-8") as devnull, redirect_stdout(devnull):
        yield stdout
