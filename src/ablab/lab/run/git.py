"""The commit of the code, and a byte-exact patch from the commit to the working tree.

Only plumbing commands are used, and files are compared and stored as bytes: git settings of the user (line endings,
prefixes, colours, filters, ignored files, …) affect neither the patch nor the list of changed files.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# All other GIT_… variables are removed: they may point to another repository, as inside a hook.
KEPT_VARIABLES = ("GIT_CONFIG", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM", "GIT_EXEC_PATH")
FIXED_VARIABLES = {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_REPLACE_OBJECTS": "1"}
SETTINGS = ("core.fsmonitor=false", "core.untrackedCache=false", "core.splitIndex=false", "core.ignoreCase=false")
PATCH = (
    *("--patch", "--binary", "--full-index", "--unified=3", "--no-color", "--no-ext-diff", "--no-textconv"),
    *("--no-renames", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/"),
    *("--submodule=short", "--ignore-submodules=none"),
)
CODE_ENDS = (".py", ".yaml")  # code even if .gitignore lists it (src/ablab/data under data/, for example)
LINK, SUBMODULE = b"120000", b"160000"


class GitError(Exception):
    """A git command that failed; the message gives the reason."""


@dataclass(frozen=True)
class Checkout:
    """A working tree and its commit.

    Args:
        root: the folder of the code, a repository or a folder in one.
        commit: the hash of HEAD; None if there is none.
        problem: the reason why there is no commit.
        changes: the files that differ from the commit, by their paths from `root`: mode and content, or None for a
            deleted file. The content of a link is its target, that of a submodule the hash of its commit.
    """

    root: Path
    commit: str | None
    problem: str = ""
    changes: Mapping[bytes, tuple[bytes, bytes] | None] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.commit}+changes" if self.changes else str(self.commit)

    def patch(self) -> bytes:
        """Return a patch for `git apply` that turns the commit into this working tree; empty without changes.

        Nothing is written to the repository.

        Raises:
            GitError: git fails.
        """
        if not self.changes or self.commit is None:
            return b""
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            (scratch / "objects").mkdir()
            objects = os.fsdecode(git(self.root, "rev-parse", "--git-path", "objects").removesuffix(b"\n"))
            quoted = os.path.abspath(self.root / objects).replace("\\", r"\\").replace('"', r"\"")
            environment = {
                "GIT_INDEX_FILE": str(scratch / "index"),
                "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
                "GIT_ALTERNATE_OBJECT_DIRECTORIES": f'"{quoted}"',
            }
            prefix = git(self.root, "rev-parse", "--show-prefix").removesuffix(b"\n")
            git(self.root, "read-tree", self.commit, environment=environment)
            entries = self.write_objects(scratch, len(self.commit), environment)
            lines = [b"%s %s\t%s%s\0" % (mode, name, prefix, path) for mode, name, path in entries]
            git(self.root, "update-index", "-z", "--index-info", stdin=b"".join(lines), environment=environment)
            return git(self.root, "diff-index", "--cached", *PATCH, self.commit, environment=environment)

    def write_objects(
        self, scratch: Path, length: int, environment: Mapping[str, str]
    ) -> list[tuple[bytes, bytes, bytes]]:
        """Write the changed contents as git objects; return mode, hash and path of each file, deletions first."""
        removed = [(b"0", b"0" * length, name) for name, now in self.changes.items() if now is None]
        entries: list[tuple[bytes, bytes, bytes]] = []
        files: list[Path] = []
        for name, now in self.changes.items():
            if now is None:
                continue
            mode, content = now
            if mode != SUBMODULE:
                files.append(scratch / f"file{len(files)}")  # a name that needs no quotes
                files[-1].write_bytes(content)
            entries.append((mode, content if mode == SUBMODULE else b"", name))
        names = "\n".join(map(str, files)).encode()
        written = git(
            self.root, "hash-object", "-w", "--no-filters", "--stdin-paths", stdin=names, environment=environment
        )
        hashes = iter(written.split())
        return removed + [(mode, known or next(hashes), name) for mode, known, name in entries]


def read_checkout(root: Path, names: Sequence[str]) -> Checkout:
    """Return the commit of `root`, and the files below the given paths that differ from it."""
    try:
        commit = git(root, "rev-parse", "--verify", "HEAD^{commit}").decode().strip()
        return Checkout(root, commit, changes=changed_files(root, commit, names))
    except (GitError, OSError) as error:
        return Checkout(root, None, problem=str(error))


def changed_files(root: Path, commit: str, names: Sequence[str]) -> dict[bytes, tuple[bytes, bytes] | None]:
    committed: dict[bytes, tuple[bytes, bytes]] = {}
    for line in git(root, "ls-tree", "-r", "-z", commit, "--", *names).split(b"\0")[:-1]:
        about, _, name = line.partition(b"\t")
        mode, _, object_name = about.split(b" ")
        committed[name] = mode, object_name
    modes_are_kept = git(root, "config", "--type=bool", "--default=true", "core.fileMode").strip() == b"true"
    found: dict[bytes, tuple[bytes, bytes] | None] = {}
    for name in sorted({*committed, *list_files(root, names)}):
        then, now = committed.get(name), read_file(root, name)
        if then is not None and then[0] == SUBMODULE:
            now = submodule_commit(root, name) or then
        elif then is not None and now is not None and not modes_are_kept and LINK not in (then[0], now[0]):
            now = then[0], now[1]
        if then is None and now is None:  # neither a regular file nor a link
            continue
        if (
            then is None
            or now is None
            or then != (now[0], now[1] if now[0] == SUBMODULE else blob_hash(now[1], then[1]))
        ):
            found[name] = now
    return found


def list_files(root: Path, names: Sequence[str]) -> Iterator[bytes]:
    """Yield tracked files, untracked files that the repository does not ignore, and all code files.

    Nested repositories are treated as plain folders; ignore rules in the user's settings have no effect.
    """
    code = [f":(glob){name}/**/*{end}" for name in names for end in CODE_ENDS]
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-per-directory=.gitignore", "--", *names)
    listed += git(root, "ls-files", "-z", "--others", "--", *code)
    for name in listed.split(b"\0")[:-1]:
        if name.endswith(b"/"):
            yield from (name + inner for inner in list_files(root / os.fsdecode(name), ["."]))
        else:
            yield name


def read_file(root: Path, name: bytes) -> tuple[bytes, bytes] | None:
    """Return git's mode of a file or link, and its content; None if it does not exist."""
    top = os.fsencode(root)
    parts = name.split(b"/")
    if any(os.path.islink(os.path.join(top, *parts[:i])) for i in range(1, len(parts))):
        return None  # below a linked folder, which git stores as a link
    path = os.path.join(top, name)
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            return LINK, os.readlink(path)
        if stat.S_ISREG(mode):
            return b"100755" if mode & stat.S_IXUSR else b"100644", Path(os.fsdecode(path)).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def submodule_commit(root: Path, name: bytes) -> tuple[bytes, bytes] | None:
    """Return the commit of a submodule; None if it is not checked out."""
    folder = root / os.fsdecode(name)
    return (SUBMODULE, git(folder, "rev-parse", "HEAD").strip()) if (folder / ".git").exists() else None


def blob_hash(content: bytes, like: bytes) -> bytes:
    """Return git's object hash of a content, with the same hash function as another object name."""
    algorithm = hashlib.sha1 if len(like) == 40 else hashlib.sha256
    return algorithm(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest().encode()


def git(root: Path, *arguments: str, stdin: bytes = b"", environment: Mapping[str, str] | None = None) -> bytes:
    """Run a git command and return its output.

    Raises:
        GitError: git is not installed, or fails.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith(KEPT_VARIABLES)
    }
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *settings, *arguments],
            input=stdin,
            env={**inherited, **FIXED_VARIABLES, **(environment or {})},
            capture_output=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise GitError("git is not installed") from error
    except OSError as error:
        raise GitError(f"git cannot be started ({error.strerror})") from error
    if done.returncode:
        raise GitError(failure_reason(done.stderr.decode(errors="replace"), root))
    return done.stdout


def failure_reason(output: str, root: Path) -> str:
    """Return git's error message as one line, with a remedy if one is known."""
    lines = [line for line in output.strip().splitlines() if line.startswith(("fatal: ", "error: "))]
    text = (lines or output.strip().splitlines() or ["git fails"])[0].partition(": ")[2] or "git fails"
    if "dubious ownership" in text:
        return f"{text}; git config --global --add safe.directory {root}"
    if "not a git repository" in text:
        return "not a git repository"
    return "there is no commit yet" if "single revision" in text else text
