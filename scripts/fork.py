"""Turn this template into a project of your own, and merge later changes of the template: docs/fork.md.

    python scripts/fork.py myproject                    a new name everywhere, and a new history
    python scripts/fork.py myproject --drop-examples    without the claims, experiments and figures of the template
    python scripts/fork.py --update PLACE [REF]         merge the template's changes since, under your names

PLACE is the template: a URL that git can fetch, or a folder. REF is a branch, a tag or a commit of it. There must be no
uncommitted changes. A fork is left for you to review and commit; an update is a commit, or a merge conflict. Exit code
2: it is not possible, and nothing has changed; 1: the update has conflicts to resolve.

"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ablab.errors import ConfigError
from ablab.lab.config.errors import readable_errors

ROOT = Path(__file__).parents[1]
RUFF = [sys.executable, "-m", "ruff"]
ORIGIN = ".template.toml"  # records the template of a fork; the template itself has no such file

# Results of the template, which do not concern the question of a fork.
EXAMPLES = ("conf/ablation/", "conf/experiment/", "docs/figures/", "tests/claims/")
# An example of each kind, which tests run by name, and the configs of scripts/benchmark.py cifar10.
KEPT = (
    "docs/figures/browse.png",
    *("conf/ablation/none.yaml", "conf/ablation/norm_batch_size.yaml"),
    *("conf/experiment/none.yaml", "conf/experiment/char_lstm.yaml"),
    *("conf/experiment/cifar10_speedrun.yaml", "conf/experiment/cifar10_speedrun_muon.yaml"),
)
# Examples in Markdown pages are enclosed by these two marks.
MARKED = re.compile(r"\n?^<!-- example -->\n.*?^<!-- end of example -->\n", re.MULTILINE | re.DOTALL)
OF_THE_TEMPLATE = ("tests/test_fork.py",)  # a fork is not forked again

CHANGELOG = """# Changes

What a user of {name} notices, the newest first.

## 0.1.0, unreleased
"""
CITATION = """cff-version: 1.2.0
title: "{name}"
message: "If this project helped your work, please cite it."
type: software
version: 0.1.0
license: Apache-2.0
authors:
  - name: "The {name} authors"
"""
CLAIMS = """# The claims, measured

Each claim is settled by a command that anyone can run, or is said not to be settled. An ablation names its claims.

| | claim | verdict |
|---|---|---|
| N2 | batch norm suffers at small batches | not measured here |
| N6 | group norm is stable at small batches | not measured here |

**N2, N6.** `python train.py ablation=norm_batch_size`
"""
RECORD = """# Where this project comes from, under the Apache License 2.0. make update reads this and writes it.
template = "{template}"
tree = "{tree}"  # the version that is in here, as git names its files: git rev-parse COMMIT^{{tree}}
examples = {examples}
"""


def git(*words: str, root: Path = ROOT) -> str:
    """Run a git command and return its output.

    Raises:
        ConfigError: the command fails.
    """
    result = subprocess.run(
        ["git", "-C", str(root), *words], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    if result.returncode != 0:
        raise ConfigError(f"git {' '.join(words)}: {(result.stderr or result.stdout).strip()}")
    return result.stdout.strip()


def check_ready() -> None:
    """Refuse to start if the change would stop halfway or could not be undone.

    Raises:
        ConfigError: ruff is missing, a file is not valid Python, the folder is not the root of a repository, or there
            are uncommitted changes.
    """
    if subprocess.run([*RUFF, "--version"], capture_output=True).returncode != 0:
        raise ConfigError(f"{sys.executable} has no ruff, which sorts the imports anew; make env installs it")
    broken = subprocess.run(
        [*RUFF, "check", "--select=E9", "--output-format=concise", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if broken.returncode != 0:
        raise ConfigError(
            f"not Python, so that its imports cannot be sorted: {broken.stdout.splitlines()[0]}; fix it first"
        )
    top = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"], capture_output=True, text=True, encoding="utf-8"
    )
    if top.returncode != 0 or Path(top.stdout.strip()).resolve() != ROOT.resolve():
        raise ConfigError(
            f"{ROOT}: not a git repository, in which this could be undone; git init && git add -A && git commit first"
        )
    if changed := git("status", "--porcelain").splitlines():
        files = ", ".join(line.split(maxsplit=1)[1] for line in changed)
        raise ConfigError(f"not committed: {files}; commit them or take them away, so that this can be undone")


def check_name(name: str) -> None:
    """Refuse an invalid package name.

    Raises:
        ConfigError: the name is invalid, or taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigError(f"NAME={name}: a package's name is needed: small letters, digits and single underscores")
    if name == package(ROOT):
        raise ConfigError(f"NAME={name}: that is its name already; give another")
    if keyword.iskeyword(name) or name in {*sys.stdlib_module_names, "test"}:
        raise ConfigError(f"NAME={name}: that is a word of Python's own; give another")
    if name in {Path(file).parts[0].removesuffix(".py") for file in tracked(ROOT)}:
        raise ConfigError(f"NAME={name}: there is a {name} beside train.py, which would be imported instead")
    if importlib.util.find_spec(name) is not None:
        raise ConfigError(f"NAME={name}: a module of that name is installed, or in scripts/; give another")


def package(root: Path) -> str:
    """Return the package name of a checkout."""
    return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"])


def tracked(root: Path) -> list[str]:
    return git("ls-files", "-z", root=root).strip("\0").split("\0")


def make_own(root: Path, name: str, *, examples: bool, tree: str) -> None:
    """Turn a checkout of the template into the same version of a fork, and stage the changes.

    Args:
        root: the checkout, without uncommitted changes.
        name: of the fork.
        examples: keep the examples.
        tree: the template version that the fork records.
    """
    template = package(root)
    gone = [file for file in tracked(root) if file in OF_THE_TEMPLATE or (not examples and is_example(file))]
    for file in gone:
        (root / file).unlink()
    for compiled in [*root.glob("src/**/__pycache__"), *root.glob("src/*.egg-info")]:
        shutil.rmtree(compiled)  # leaves no folder with the old name
    for file in sorted({*tracked(root)} - {*gone}):
        rename(root, file, template, name)

    (root / "CHANGELOG.md").write_text(CHANGELOG.format(name=name), encoding="utf-8")
    (root / "CITATION.cff").write_text(CITATION.format(name=name), encoding="utf-8")
    project = root / "pyproject.toml"
    project.write_text(
        re.sub(r'^version = ".*"$', 'version = "0.1.0"', project.read_text(encoding="utf-8"), count=1, flags=re.M),
        encoding="utf-8",
    )
    if not examples:
        (root / "docs" / "claims.md").write_text(CLAIMS, encoding="utf-8")
        for page in (root / "README.md", *(root / "docs").glob("*.md")):
            page.write_text(MARKED.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    record = RECORD.format(template=template, tree=tree, examples=str(examples).lower())
    (root / ORIGIN).write_text(record, encoding="utf-8")
    in_order(root)
    git("add", "-A", root=root)


def is_example(file: str) -> bool:
    return file.startswith(EXAMPLES) and file not in KEPT


def rename(root: Path, file: str, old: str, new: str) -> None:
    """Replace a word by another in the text and path of a file; parts of longer words stay."""

    def cased(found: re.Match[str]) -> str:
        word = found.group()
        return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new

    word = re.compile(rf"(?<![a-z0-9]){old}(?![a-z0-9])", re.IGNORECASE)
    place, target = root / file, root / word.sub(cased, file)
    if target != place:
        os.renames(place, target)
    content = target.read_bytes()
    if b"\0" not in content:  # skip binary files
        text = content.decode(errors="surrogateescape")
        if (renamed := word.sub(cased, text)) != text:
            target.write_bytes(renamed.encode(errors="surrogateescape"))


def in_order(root: Path) -> None:
    """Sort imports and wrap lines for the new name; comments that become too long are tolerated."""
    for words in (["check", "--fix-only", "--select=I"], ["format"], ["check", "--add-noqa", "--select=E501"]):
        subprocess.run([*RUFF, *words, "--quiet", "."], cwd=root, check=True, stdout=subprocess.DEVNULL)


def fork(name: str, *, examples: bool) -> None:
    """Rename the repository, and leave the changes to be committed.

    Raises:
        ConfigError: the name is invalid, the repository is a fork already, or there are uncommitted changes.
    """
    check_ready()
    if (ROOT / ORIGIN).exists():
        raise ConfigError(f"this is a fork already, {package(ROOT)}; {ORIGIN} says what of")
    check_name(name)
    make_own(ROOT, name, examples=examples, tree=git("rev-parse", "HEAD^{tree}"))
    print(f"This is {name} now. Read the change with git diff --staged, then: git commit -m 'Begin {name}'")
    print("Yours to write: README.md's beginning, the description in pyproject.toml, the authors in CITATION.cff.")


def update(place: str, ref: str) -> int:
    """Merge the changes of the template since the version in here, under the fork's names.

    Raises:
        ConfigError: the template does not exist, never had this version, or there are uncommitted changes.
    """
    check_ready()
    if not (ROOT / ORIGIN).exists():
        raise ConfigError(f"there is no {ORIGIN} here: this is no fork; make fork NAME=myproject makes one")
    record, name = tomllib.loads((ROOT / ORIGIN).read_text(encoding="utf-8")), package(ROOT)
    git("fetch", "--quiet", "--no-tags", place, ref)
    versions = dict(reversed(line.split()) for line in git("log", "--format=%H %T", "FETCH_HEAD").splitlines())
    before = next((tree for tree in [record["tree"], *git("log", "--format=%T").split()] if tree in versions), None)
    if before is None:
        raise ConfigError(
            f"{place}: it never was what {ORIGIN} has as tree={record['tree'][:12]}; find the commit from which this "
            "project began, and put there what git rev-parse COMMIT^{tree} prints"
        )
    now, tree = git("rev-parse", "FETCH_HEAD"), git("rev-parse", "FETCH_HEAD^{tree}")
    if tree == before:
        print(f"nothing is new: this has all of {now[:12]}")
        return 0
    subjects = git("log", "--format=- %s", f"{versions[before]}..{now}")
    examples = record["examples"]
    old = own_tree(versions[before], name, examples=examples, tree=record["tree"])
    base = commit(old, f"The template at {before[:12]}")
    message = f"Update from the template, at {now[:12]}\n\n{subjects}"
    new = commit(own_tree(now, name, examples=examples, tree=tree), message, "-p", base)
    try:
        git("cherry-pick", new)
    except ConfigError:
        conflicts = git("diff", "--name-only", "--diff-filter=U").splitlines()
        if not conflicts:
            raise
        print(f"in conflict: {', '.join(conflicts)}", file=sys.stderr)
        print("fix them, git add them, then git cherry-pick --continue; or git cherry-pick --abort", file=sys.stderr)
        return 1
    print(message)
    return 0


def own_tree(version: str, name: str, *, examples: bool, tree: str) -> str:
    """Return the tree hash of a template commit converted for this fork, see `make_own`."""
    with checkout(version) as root:
        make_own(root, name, examples=examples, tree=tree)
        return git("write-tree", root=root)


@contextmanager
def checkout(version: str) -> Iterator[Path]:
    """Check out the files of a commit into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "template"
        git("worktree", "add", "--quiet", "--detach", str(root), version)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def commit(tree: str, message: str, *words: str) -> str:
    return git("commit-tree", tree, "-m", message, *words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the project and its package")
    parser.add_argument("--drop-examples", action="store_true", help="leave out the results of the template")
    parser.add_argument(
        "--update", nargs="*", metavar=("PLACE", "REF"), help="the template, and a branch, tag or commit of it"
    )
    options = parser.parse_args()
    if options.update is not None:
        if not 1 <= len(options.update) <= 2 or options.name or options.drop_examples:
            raise ConfigError("--update: where the template is, and nothing else than a REF of it; --update PLACE REF")
        place, ref = [*options.update, "HEAD"][:2]
        return update(place, ref)
    if not options.name:
        raise ConfigError("NAME: the project needs one; make fork NAME=myproject")
    fork(options.name, examples=not options.drop_examples)
    return 0


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
