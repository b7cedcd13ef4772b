"""Text files for language modelling."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, NamedTuple

from ablab.data.files import first_names, list_files
from ablab.data.token_stream import Parts, TokenStream


class Text(TokenStream):
    """The text of a file, or of all files of a folder.

    In a folder, hidden files and folders, editor backups (`.ipynb_checkpoints`, `book.txt~`, `.bak`) and duplicates of
    files are skipped, so that no text is in two splits; the run reports their number. Line endings are kept, and the
    byte order mark at the start of a file is removed.

    Args:
        path: a UTF-8 file, or a folder whose files are read in the order of their paths; None uses the documentation of
            Python's keywords and topics, which is part of every Python installation.
        settings: see `TokenStream` and `DataModule`.

    Shape:
        inputs `(N, context_length)`, targets `(N, context_length)`

    Raises:
        ValueError: the path does not exist, a file is not UTF-8 text, or there is too little text.
    """

    def __init__(self, *, path: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if path == "":
            raise ValueError("path=: it is empty; give a file or a folder, or null for Python's own documentation")
        self.path = path
        self.notes: list[str] = []

    @property
    def source(self) -> str:
        return f"path={self.path or 'null'}"

    def load(self) -> Parts:
        text, self.notes = read_text(self.path)
        return self.split_text(text)

    def caveats(self) -> list[str]:
        return [*super().caveats(), *self.notes]


class TextRead(NamedTuple):
    """A text, and remarks on skipped files."""

    text: str
    notes: list[str]


def read_text(path: str | None) -> TextRead:
    """Read the text of a file, of a folder's files, or of Python's documentation.

    Raises:
        ValueError: the path does not exist, or a file is not UTF-8 text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return TextRead("\n\n".join(topics[name] for name in sorted(topics)), [])
    place = Path(path)
    if place.is_file():
        return TextRead(read_file(path, place), [])
    if not place.is_dir():
        what = "this is neither a file nor a folder" if place.exists() else "there is no such file or folder"
        raise ValueError(f"path={path}: {what}; give a UTF-8 text, or null for the default")
    files, left_out = list_files(place)
    texts: list[str] = []
    seen: set[str] = set()
    copies: list[Path] = []
    for file in files:
        text = read_file(path, file)
        if text and text in seen:
            copies.append(file)
        else:
            texts.append(text)
            seen.add(text)
    if not any(texts):
        raise ValueError(f"path={path}: the folder is empty; give one that has UTF-8 text files")
    notes = [
        f"{len(some)} {what if len(some) > 1 else one} left out ({first_names(some, place)})"
        for some, what, one in (
            (left_out, "hidden files and backups", "hidden file or backup"),
            (copies, "copies of other files", "copy of another file"),
        )
        if some
    ]
    return TextRead("\n".join(texts), notes)


def read_file(path: str, file: Path) -> str:
    """Return the text of a UTF-8 file, without the byte order mark and with its line endings.

    Args:
        path: value of the setting `path`, for error messages.
        file: the file.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = "a link to a file that is not there" if file.is_symlink() and not file.exists() else error.strerror
        raise ValueError(f"path={path}: {file} cannot be read ({reason}); fix it, or leave it out") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"path={path}: {file} is UTF-16; convert it to UTF-8, or leave it out")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"path={path}: {file} is not UTF-8 (line {line}, byte {error.start} is "
            f"0x{error.object[error.start]:02x}); convert it, or leave it out"
        ) from error
    if "\0" in text:
        raise ValueError(f"path={path}: {file} is binary (byte {content.index(0)} is 0x00); leave it out")
    return text
