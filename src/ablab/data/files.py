"""List the files of a folder, without hidden files and editor backups."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HIDDEN = {"__MACOSX", "__pycache__"}
BACKUPS = ("~", ".bak", ".orig", ".swo", ".swp", ".tmp")


class Listing(NamedTuple):
    """The files below a folder, and the files and folders that were skipped."""

    files: list[Path]
    left_out: list[Path]


def list_files(folder: Path) -> Listing:
    """List the files below a folder recursively, sorted by path independently of the locale.

    Links to folders are followed, and each folder is listed once, so that cycles end. Dangling links are listed, so
    that reading them fails. Hidden entries, editor backups and special files such as pipes are skipped.

    Raises:
        ValueError: a folder cannot be read.
    """
    files: list[Path] = []
    left_out: list[Path] = []
    visited: set[Path] = set()

    def visit(path: Path) -> None:
        if path.is_dir():
            if (real := path.resolve()) in visited:
                return
            visited.add(real)
            try:
                entries = sorted(path.iterdir())
            except OSError as error:
                raise ValueError(f"{path}: the folder cannot be read ({error.strerror})") from error
            for entry in entries:
                if is_hidden_or_backup(entry.name):
                    left_out.append(entry)
                else:
                    visit(entry)
        elif path.is_file() or path.is_symlink():
            files.append(path)
        else:
            left_out.append(path)

    visit(folder)
    return Listing(files, left_out)


def is_hidden_or_backup(name: str) -> bool:
    """Return whether a name is that of a hidden file or folder, or of an editor backup."""
    is_autosave = name.startswith("#") and name.endswith("#")  # of Emacs
    return name.startswith(".") or name in HIDDEN or is_autosave or name.lower().endswith(BACKUPS)


def first_names(paths: list[Path], folder: Path, limit: int = 3) -> str:
    """Return the first paths relative to their folder, for messages."""
    names = [str(path.relative_to(folder)) for path in paths[:limit]]
    return ", ".join(names) + (", …" if len(paths) > limit else "")
