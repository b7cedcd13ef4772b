"""The code of a run: the package, the user's own modules that the config names, and other files that it names."""

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
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")  # a `_target_`, or the path argument of hydra.utils.get_method
INSTALLED = {"site-packages", "dist-packages"}
# Limits on the files and bytes hashed in a folder that a config names; beyond them, names, sizes and modification times
# are hashed.
MOST_FILES = 10_000
MOST_BYTES = 2**30

Files = dict[str, str]  # SHA-256 by name

memo: dict[Any, Any] | None = None  # hashes computed so far, within `cache_hashes`


@dataclass(frozen=True)
class Code:
    """Hashes of all code and files that affect the result of a run, except data and installed packages.

    Args:
        package: SHA-256 of this package's source files; the config covers conf/.
        files: SHA-256 of each other file: modules by their path in their package (mylab/net.py), other files and
            folders as the config names them.
    """

    package: str
    files: Files

    @property
    def digest(self) -> str:
        """A single hash of the code; the hash of the package if there is nothing else."""
        if not self.files:
            return self.package
        return hashlib.sha256(repr((self.package, sorted(self.files.items()))).encode()).hexdigest()

    @property
    def sources(self) -> list[dict[str, str]]:
        """Every part with its hash, for the record of a run."""
        parts = {PACKAGE.name: self.package, **self.files}
        return [{"path": path, "sha256": found} for path, found in parts.items()]


@contextmanager
def cache_hashes() -> Iterator[None]:
    """Hash everything at most once inside this context, for the runs of a sweep.

    Python imports a module once, too: an edit during a sweep changes neither its runs nor their records. The next
    launch sees it.
    """
    global memo
    before = memo
    memo = {} if before is None else before
    try:
        yield
    finally:
        memo = before


def code_of(config: Mapping[str, Any]) -> Code:
    """Hash the code of a run.

    This covers the package; external modules that the config names (as `_target_` or otherwise), with the modules of
    the same project that they import; and every file and folder that the config names. It leaves out data paths, which
    the fingerprint of the data covers, and keys without effect on the result. Installed packages count by their
    versions, in environment.json. Nothing is imported.

    Args:
        config: the resolved config as plain data.
    """
    files: Files = {}
    for value in scientific(config).values():
        if isinstance(value, str) and value:
            files |= memoize(("named", value), lambda value=value: files_named_by(value))
    return Code(memoize(("package", PACKAGE), package_hash), dict(sorted(files.items())))


def changed_sources(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Describe the parts of the code that differ: `mylab/net.py`, `weights.pt (not there now)`."""
    found = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            found.append(
                path + (" (not there then)" if path not in old else " (not there now)" if path not in new else "")
            )
    return found


def sources_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each part of a run's code, from its run.json; older runs have a single hash."""
    sources = record.get("sources")
    if not isinstance(sources, list) or not all({"path", "sha256"} <= part.keys() for part in sources):
        return {PACKAGE.name: str(record["identity"]["code"])}
    return {str(part["path"]): str(part["sha256"])[:16] for part in sources}


def package_hash() -> str:
    """Return the SHA-256 of the package's source files, committed or not."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def memoize(key: tuple[Any, ...], compute: Any) -> Any:
    """Return a value, computed once within `cache_hashes`."""
    if memo is None:
        return compute()
    if key not in memo:
        memo[key] = compute()
    return memo[key]


def files_named_by(value: str) -> Files:
    """Return the modules, or the file or folder, that a value of the config names."""
    # a bare word (train, label, test) is rarely meant as a path, though a folder of that name may exist
    is_path = os.sep in value or "." in value or value.startswith("~")
    files = file_or_folder(value) if is_path else {}
    if not files and DOTTED.fullmatch(value):
        for name, file in modules_from(value).items():
            files[name] = file_hash(file)
    return files


# Modules ------------------------------------------------------------------------------------------------------------


def modules_from(target: str) -> dict[str, Path]:
    """Return the user's own modules that a dotted path needs, by their paths in their packages."""
    found: dict[str, Path] = {}
    todo = [target]
    while todo:
        for module, file in own_modules(todo.pop()):
            suffix = "/__init__.py" if file.name == "__init__.py" else file.name[len(file.name.partition(".")[0]) :]
            name = module.replace(".", "/") + suffix
            if name not in found:
                found[name] = file
                if file.suffix == ".py":
                    todo += imported_names(module, file)
    return found


def own_modules(dotted: str) -> Iterator[tuple[str, Path]]:
    """Yield the modules that importing a dotted path executes: its packages, and its longest module prefix."""
    parts = dotted.split(".")
    folders = None
    for i in range(len(parts)):
        file, folders = locate(parts[i], folders)
        if file is not None:
            if not is_own(file):
                return
            yield ".".join(parts[: i + 1]), file
        if not folders:
            return


def locate(name: str, folders: list[Path] | None) -> tuple[Path | None, list[Path]]:
    """Return the file of a module and, for a package, the folders of its submodules, without importing it.

    Args:
        name: the last part of the dotted path of the module.
        folders: the folders of its package; None at the top level.
    """
    if folders is None:
        if name == PACKAGE.name or name in sys.builtin_module_names:
            return None, []
        try:
            spec = importlib.util.find_spec(name)
        except (ValueError, ImportError):  # a module without a spec: __main__, or one created by a program
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
    return None, [folder / name for folder in folders if (folder / name).is_dir()]  # a namespace package


def is_own(file: Path) -> bool:
    """Return whether a module is the user's own: not installed by a package manager, but editable or on PYTHONPATH."""
    return not INSTALLED.intersection(file.parts) and not any(
        file.is_relative_to(place) for place in standard_library()
    )


@cache
def standard_library() -> list[str]:
    return [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]


def imported_names(module: str, file: Path) -> Iterator[str]:
    """Yield the dotted paths that a module imports anywhere in its source."""
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
    """Return the hash of the file or folder at a path, relative to the working directory; empty if there is none."""
    path = Path(os.path.expanduser(value.removeprefix("file://")))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # missing, or not a valid path
        return {}
    if stat.S_ISREG(mode):
        with status_lines(f"hashing {value}"):
            return {value: file_hash(path)}
    if stat.S_ISDIR(mode) and not Path.cwd().is_relative_to(path.resolve()):  # the working directory holds the runs
        with status_lines(f"hashing {value}"):
            return {value: folder_hash(path)}
    return {}


def file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"not readable: {error.strerror}"  # the code that needs the file will raise


def folder_hash(folder: Path) -> str:
    """Return a hash of all names in a folder, and of file contents up to `MOST_FILES` and `MOST_BYTES`."""
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
