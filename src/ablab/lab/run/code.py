"""The code of a run: the package, the user's own modules that the config names, and the files that it names."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import Any

from ablab.lab.run.identity import scientific
from ablab.status import status_lines

PACKAGE = Path(__file__).parents[2]
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")  # what a `_target_` is, and the path of a hydra.utils.get_method
INSTALLED = {"site-packages", "dist-packages"}
# Of a folder that a config names, the content of so many files and bytes is hashed; of the rest the names, sizes and
# times of modification.
MOST_FILES = 10_000
MOST_BYTES = 2**30

Files = dict[str, str]  # the SHA-256 of each, by its name

remembered: dict[Any, Any] | None = None  # what has been hashed, within `hashed_once`


@dataclass(frozen=True)
class Code:
    """Hashes of all code and files that decide a run's result, apart from the data and the installed packages.

    Args:
        package: SHA-256 of this package's source files; conf/ is in the config already.
        files: SHA-256 of each other file: a module by its place in its package (mylab/net.py), another file or folder
            as the config names it.
    """

    package: str
    files: Files

    @property
    def digest(self) -> str:
        """One hash of it all; that of the package where there is nothing else."""
        if not self.files:
            return self.package
        return hashlib.sha256(repr((self.package, sorted(self.files.items()))).encode()).hexdigest()

    @property
    def sources(self) -> list[dict[str, str]]:
        """Every part with its hash, for a run's record."""
        parts = {PACKAGE.name: self.package, **self.files}
        return [{"path": path, "sha256": found} for path, found in parts.items()]


@contextmanager
def hashed_once() -> Iterator[None]:
    """Within, nothing is hashed twice, for the runs of a sweep: Python imports a module once, too.

    An edit during a sweep therefore changes neither its runs nor their record; the next launch sees it.
    """
    global remembered
    before = remembered
    remembered = {} if before is None else before
    try:
        yield
    finally:
        remembered = before


def code_of(config: Mapping[str, Any]) -> Code:
    """Hash the code of a run.

    Counted are the package, the modules outside of it that the config names (as `_target_` or otherwise) with every
    module that they import from the same project, and every file and folder that a value of the config names. The
    data's places, which the data's fingerprint covers, and keys without effect on the result are left out. Installed
    packages count by their versions, which environment.json has. Nothing is imported.

    Args:
        config: the resolved config as plain data.
    """
    files: Files = {}
    for value in scientific(config).values():
        if isinstance(value, str) and value:
            files |= once(("named", value), lambda value=value: named_by(value))
    return Code(once(("package", PACKAGE), package_hash), dict(sorted(files.items())))


def changed_sources(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The parts of the code that differ, in words: `mylab/net.py`, `weights.pt (not there now)`."""
    found = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            found.append(
                path + (" (not there then)" if path not in old else " (not there now)" if path not in new else "")
            )
    return found


def sources_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The hash of each part of a run's code, from its run.json; a run from before parts were recorded has one."""
    sources = record.get("sources")
    if not isinstance(sources, list) or not all({"path", "sha256"} <= part.keys() for part in sources):
        return {PACKAGE.name: str(record["identity"]["code"])}
    return {str(part["path"]): str(part["sha256"])[:16] for part in sources}


def package_hash() -> str:
    """The SHA-256 of the package's source files, committed or not."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def once(key: tuple[Any, ...], compute: Any) -> Any:
    """A value, computed once within `hashed_once`."""
    if remembered is None:
        return compute()
    if key not in remembered:
        remembered[key] = compute()
    return remembered[key]


def named_by(value: str) -> Files:
    """The modules, or the file or folder, that a value of the config names."""
    # a word alone (train, label, test) is hardly ever meant as a path, and a folder of that name may be there
    is_path = os.sep in value or "." in value or value.startswith("~")
    files = file_or_folder(value) if is_path else {}
    if not files and DOTTED.fullmatch(value):
        for name, file in modules_from(value).items():
            files[name] = file_hash(file)
    return files


# Modules ------------------------------------------------------------------------------------------------------------


def modules_from(target: str) -> dict[str, Path]:
    """The user's own modules that a dotted path needs, by their places in their packages."""
    found: dict[str, Path] = {}
    todo = [target]
    while todo:
        for module, file in own_modules(todo.pop()):
            suffix = "/__init__.py" if file.name == "__init__.py" else file.name[len(file.name.partition(".")[0]) :]
            name = module.replace(".", "/") + suffix
            if name not in found:
                found[name] = file
                if file.suffix == ".py":
                    todo += imports(module, file)
    return found


def own_modules(dotted: str) -> Iterator[tuple[str, Path]]:
    """The modules that importing a dotted path runs: its packages, and as much of it as is a module."""
    parts = dotted.split(".")
    folders = None
    for i in range(len(parts)):
        file, folders = located(parts[i], folders)
        if file is not None:
            if not is_own(file):
                return
            yield ".".join(parts[: i + 1]), file
        if not folders:
            return


def located(name: str, folders: list[Path] | None) -> tuple[Path | None, list[Path]]:
    """The file of a module and, of a package, the folders of its submodules, found without importing it.

    Args:
        name: the last part of the module's dotted path.
        folders: of its package; None at the top level.
    """
    if folders is None:
        if name == PACKAGE.name or name in sys.builtin_module_names:
            return None, []
        try:
            spec = importlib.util.find_spec(name)
        except (ValueError, ImportError):  # a module without a spec: __main__, or one that a program has made
            file = getattr(sys.modules.get(name), "__file__", None)
            return (Path(file) if file else None), []
        if spec is None:
            return None, []
        file = Path(spec.origin) if spec.origin else None
        return (file if file and file.is_file() else None), [Path(f) for f in spec.submodule_search_locations or []]
    for folder in folders:
        if (init := folder / name / "__init__.py").is_file():
            return init, [folder / name]
        for suffix in all_suffixes():
            if (file := folder / f"{name}{suffix}").is_file():
                return file, []
    return None, [folder / name for folder in folders if (folder / name).is_dir()]  # a namespace


def is_own(file: Path) -> bool:
    """Whether a module is the user's own; editable installs and PYTHONPATH are, what a package manager put is not."""
    return not INSTALLED.intersection(file.parts) and not any(
        file.is_relative_to(place) for place in standard_library()
    )


@cache
def standard_library() -> list[str]:
    return [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]


def imports(module: str, file: Path) -> Iterator[str]:
    """The dotted paths that a module imports, wherever in it, as far as its source tells."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # importing it fails with a better message
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*filter(None, above), *filter(None, [node.module])])
            for alias in node.names:
                if alias.name == "*" and (folders := [f for _, f in own_modules(origin) if f.name == "__init__.py"]):
                    yield from (f"{origin}.{other.stem}" for other in folders[-1].parent.glob("*.py"))
                yield f"{origin}.{alias.name}" if origin else alias.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield f"{package}{argument.value}" if argument.value.startswith(".") else argument.value


# Files --------------------------------------------------------------------------------------------------------------


def file_or_folder(value: str) -> Files:
    """The hash of the file or folder that a value names, seen from the working directory; nothing if it names none."""
    path = Path(os.path.expanduser(value.removeprefix("file://")))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # there is none of that name, or there can be none
        return {}
    if stat.S_ISREG(mode):
        with status_lines(f"hashing {value}"):
            return {value: file_hash(path)}
    if stat.S_ISDIR(mode) and not Path.cwd().is_relative_to(path.resolve()):  # that one has the runs in it
        with status_lines(f"hashing {value}"):
            return {value: folder_hash(path)}
    return {}


def file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"not readable: {error.strerror}"  # whoever needs it says so


def folder_hash(folder: Path) -> str:
    """A hash of every name in a folder, with the content of files up to `MOST_FILES` and `MOST_BYTES`."""
    found = hashlib.sha256()
    num_files = num_bytes = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".git", "__pycache__")))
        for name in sorted(names):
            path = Path(place, name)
            try:
                about = path.stat()
            except OSError:  # a dangling link
                found.update(repr((str(path.relative_to(folder)), "missing")).encode())
                continue
            if not stat.S_ISREG(about.st_mode):
                continue
            num_files += 1
            num_bytes += about.st_size
            is_hashed = num_files <= MOST_FILES and num_bytes <= MOST_BYTES
            content = file_hash(path) if is_hashed else about.st_mtime_ns
            found.update(repr((str(path.relative_to(folder)), about.st_size, content)).encode())
    return found.hexdigest()
