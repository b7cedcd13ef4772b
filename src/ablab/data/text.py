"""Any text in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ablab.data.token_stream import Parts, TokenStream


class Text(TokenStream):
    """The text of a file, or of the files of a folder.

    Args:
        path: a UTF-8 file, or a folder whose files are read in the order of their names; None takes the
            documentation of Python's keywords and topics, which every Python ships.
        settings: see `TokenStream` and `DataModule`.

    Shape:
        inputs `(N, context_length)`, targets `(N, context_length)`

    Raises:
        ValueError: no such file or folder, a file that is not UTF-8, or too little text.
    """

    def __init__(self, *, path: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if path == "":
            raise ValueError("path=: it is empty; give a file or a folder, or null for Python's own documentation")
        self.path = path

    @property
    def source(self) -> str:
        return f"path={self.path or 'null'}"

    def load(self) -> Parts:
        return self.divided(read_text(self.path))


def read_text(path: str | None) -> str:
    """The text of a file, of a folder's files, or of Python's own documentation."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    place = Path(path)
    if not place.exists():
        raise ValueError(f"path={path}: there is no such file or folder; give a UTF-8 text, or null for the default")
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"path={path}: the folder is empty; give one that has UTF-8 text files")
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))  # read_text would change line ends
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ValueError(
                f"path={path}: {file} is not UTF-8 (line {line}, byte {error.start} is "
                f"0x{error.object[error.start]:02x}); convert it, or leave it out"
            ) from error
        except OSError as error:
            raise ValueError(f"path={path}: {file} cannot be read ({error.strerror})") from error
    return "\n".join(texts)
