"""`make fork` and `make update`: a project of its own from a copy of this one, and later changes in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.forked import PYTEST
from tests.forked import run as start
from tests.polling import LIMIT
from tests.repository import committed, git

ROOT = Path(__file__).parents[1]
OLD = "ablab"
Result = subprocess.CompletedProcess[str]


def settings_of(folder: Path) -> dict[str, str]:
    who = {f"GIT_{role}_{key}": "someone" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    return {**os.environ, **who, "PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}


def python(folder: Path, *words: str) -> Result:
    """Run the Python of a checkout, with its own package."""
    words = (sys.executable, *words)
    return subprocess.run(words, cwd=folder, env=settings_of(folder), capture_output=True, text=True)


def forked_python(folder: Path, *words: str) -> Result:
    """Do the same in a process that has loaded the libraries."""
    return start(folder / words[0], words[1:], folder=folder, environment=settings_of(folder), timeout=LIMIT)


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """The files of this repository as they are now, in one commit, as a GitHub template gives them."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git repository")
    for name in listed.stdout.strip("\0").split("\0"):
        if (ROOT / name).exists():
            (tmp_path / "template" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "template" / name)
    committed(tmp_path / "template", "Initial commit")
    return tmp_path / "template"


@pytest.fixture
def forked(template: Path, tmp_path: Path) -> Callable[..., Path]:
    """A fork of the template, by clone or from its files alone, committed."""

    def make(name: str, *words: str, history: bool = True) -> Path:
        folder = tmp_path / name
        if history:
            git(tmp_path, "clone", "--quiet", str(template), str(folder))
        else:
            shutil.copytree(template, folder, ignore=shutil.ignore_patterns(".git"))
            committed(folder, "Initial commit")
        result = forked_python(folder, "scripts/fork.py", name, *words)
        assert (result.returncode, result.stderr) == (0, "")
        committed(folder, f"Begin {name}")
        return folder

    return make


def text_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in git(folder, "ls-files", "-z").strip("\0").split("\0")}


@pytest.mark.parametrize(
    ("name", "words"), [("zebra", []), ("a_study_of_normalization", ["--drop-examples"])], ids=["kept", "dropped"]
)
def test_a_fork_is_a_whole_project_of_another_name(forked: Callable[..., Path], name: str, words: list[str]) -> None:
    fork = forked(name, *words)
    files = text_of(fork)
    assert not [file for file in files if OLD in file.lower()]
    assert [file for file, content in files.items() if OLD.encode() in content.lower()] == [".template.toml"]
    assert f"{name.upper()}_CACHE".encode() in files[f"src/{name}/data/cache.py"]
    assert not (fork / "src" / OLD).exists()
    assert ("docs/figures/drift.png" in files) == ("conf/ablation/shift.yaml" in files) == (not words)

    for check in (["check"], ["format", "--check"]):
        result = python(fork, "-m", "ruff", *check, ".")
        assert result.returncode == 0, result.stdout
    help = python(fork, "train.py", "--help")
    assert "python train.py norm=groupnorm" in help.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [pytest.param([], marks=pytest.mark.thorough), ["--drop-examples"]], ids=["kept", "dropped"]
)
def test_a_fork_trains_and_passes_its_tests(forked: Callable[..., Path], words: list[str]) -> None:
    fork = forked("a_study_of_normalization", *words)
    smoke = forked_python(fork, "train.py", "trainer=smoke", "logger=csv")
    assert (smoke.returncode, smoke.stderr) == (0, "")

    telling = ["test_docs.py", "test_readme.py", *(["test_imports.py", "test_new.py"] if words else [])]
    quick = ["-p", "no:cacheprovider", "-m", "not slow and not thorough"]
    quick += ["-k", "not command and not benchmark and not training and not started_from_anywhere"]
    (fork.parent / "run_pytest.py").write_text(PYTEST)
    result = forked_python(fork, "../run_pytest.py", *quick, *(f"tests/{file}" for file in telling))
    assert result.returncode == 0, result.stdout


def test_the_history_of_a_fork_begins_with_it(forked: Callable[..., Path]) -> None:
    fork = forked("zebra")
    assert OLD not in (fork / "CHANGELOG.md").read_text().lower()
    assert 'title: "zebra"' in (fork / "CITATION.cff").read_text()
    assert tomllib.loads((fork / "pyproject.toml").read_text())["project"]["version"] == "0.1.0"
    assert (fork / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert tomllib.loads((fork / ".template.toml").read_text())["template"] == OLD


REFUSED = [
    ("my-project", "NAME=my-project: a package's name is needed"),
    ("2fast", "NAME=2fast: a package's name is needed"),
    ("MyProject", "NAME=MyProject: a package's name is needed"),
    ("lambda", "NAME=lambda: that is a word of Python's own"),
    ("test", "NAME=test: that is a word of Python's own"),
    ("json", "NAME=json: that is a word of Python's own"),
    ("torch", "NAME=torch: a module of that name is installed"),
    ("benchmarks", "NAME=benchmarks: a module of that name is installed, or in scripts/"),
    ("conf", "NAME=conf: there is a conf beside train.py"),
    (OLD, f"NAME={OLD}: that is its name already"),
]


def test_a_name_that_cannot_be_is_refused(template: Path) -> None:
    for name, message in REFUSED:
        result = forked_python(template, "scripts/fork.py", name)
        assert (result.returncode, result.stderr[: len("error: ") + len(message)]) == (2, f"error: {message}")
    assert git(template, "status", "--porcelain") == ""


def test_nothing_is_forked_that_could_not_be_undone(template: Path, forked: Callable[..., Path]) -> None:
    again = forked_python(forked("zebra"), "scripts/fork.py", "giraffe")
    assert (again.returncode, again.stderr) == (
        2,
        "error: this is a fork already, zebra; .template.toml says what of\n",
    )
    (template / "scripts" / "broken.py").write_text("def\n")
    committed(template)
    broken = forked_python(template, "scripts/fork.py", "zebra")
    assert broken.returncode == 2
    assert "not Python, so that its imports cannot be sorted: scripts/broken.py" in broken.stderr
    assert git(template, "status", "--porcelain") == ""
    (template / "scripts" / "broken.py").unlink()
    committed(template)
    (template / "notes.txt").write_text("mine\n")
    change(template / "README.md", "# ablab\n", "# mine\n")
    dirty = forked_python(template, "scripts/fork.py", "zebra")
    assert (dirty.returncode, dirty.stderr.partition(";")[0]) == (2, "error: not committed: README.md, notes.txt")
    shutil.rmtree(template / ".git")
    bare = forked_python(template, "scripts/fork.py", "zebra")
    assert bare.returncode == 2
    assert "not a git repository" in bare.stderr


@pytest.mark.parametrize(
    "history", [pytest.param(True, marks=pytest.mark.thorough), False], ids=["clone", "GitHub template"]
)
def test_an_update_brings_the_templates_changes_under_the_forks_name(
    template: Path, forked: Callable[..., Path], history: bool
) -> None:
    fork = forked("zebra", "--drop-examples", history=history)
    change(fork / "README.md", "# zebra\n", "# Zebras\n")
    change(fork / "src/zebra/digest.py", '"""\n\nfrom', '"""  # ours\n\nfrom')
    committed(fork)

    (template / "src/ablab/norms/mine.py").write_text('from ablab.norms.norm import Norm\n\n__all__ = ["Norm"]\n')
    with (template / "src/ablab/digest.py").open("a") as digest:
        digest.write("# a mend, in ablab.digest\n")
    (template / "conf/ablation/another.yaml").write_text("# an example more\n")
    change(template / "pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"')
    with (template / "CHANGELOG.md").open("a") as changes:
        changes.write("- ablab has a norm more.\n")
    committed(template, "A norm more")

    result = forked_python(fork, "scripts/fork.py", "--update", str(template))
    assert (result.returncode, result.stderr) == (0, "")
    assert "- A norm more" in result.stdout
    assert "from zebra.norms.norm" in (fork / "src/zebra/norms/mine.py").read_text()
    digest = (fork / "src/zebra/digest.py").read_text()
    assert '"""  # ours\n' in digest
    assert digest.endswith("# a mend, in zebra.digest\n")
    assert (fork / "README.md").read_text().startswith("# Zebras\n")
    assert not (fork / "conf/ablation/another.yaml").exists()
    assert tomllib.loads((fork / "pyproject.toml").read_text())["project"]["version"] == "0.1.0"
    assert "norm more" not in (fork / "CHANGELOG.md").read_text()
    assert git(fork, "status", "--porcelain") == ""
    assert git(fork, "worktree", "list").count("\n") == 1

    again = forked_python(fork, "scripts/fork.py", "--update", str(template))
    assert again.stdout.startswith("nothing is new")


def test_what_both_have_changed_is_a_conflict_of_gits(template: Path, forked: Callable[..., Path]) -> None:
    fork = forked("zebra", history=False)
    line = "A PyTorch Lightning research template for reproducible ablations:"
    change(fork / "README.md", line, "How zebras count.")
    committed(fork)
    change(template / "README.md", line, "A template, ablab.")
    committed(template)
    result = forked_python(fork, "scripts/fork.py", "--update", str(template))
    assert (result.returncode, result.stderr.splitlines()[0]) == (1, "in conflict: README.md")
    text = (fork / "README.md").read_text()
    assert "<<<<<<< HEAD\nHow zebras count." in text
    assert "A template, zebra." in text
    change(fork / "README.md", text[text.index("<<<<<<<") : text.index("\n", text.index(">>>>>>>")) + 1], "Both.\n")
    git(fork, "add", "README.md")
    git(fork, "-c", "core.editor=true", "cherry-pick", "--continue")
    assert forked_python(fork, "scripts/fork.py", "--update", str(template)).stdout.startswith("nothing is new")


def test_a_fork_may_have_changed_things_before_it_was_named(template: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork"
    shutil.copytree(template, fork, ignore=shutil.ignore_patterns(".git"))
    committed(fork, "Initial commit")
    change(fork / "README.md", "# ablab\n", "# Zebras\n")
    committed(fork)
    assert forked_python(fork, "scripts/fork.py", "zebra").returncode == 0
    committed(fork)
    (template / "docs/new.md").write_text("# New in ablab\n")
    committed(template)
    assert forked_python(fork, "scripts/fork.py", "--update", str(template)).returncode == 0
    assert (fork / "docs/new.md").read_text() == "# New in zebra\n"
    assert (fork / "README.md").read_text().startswith("# Zebras\n")


def test_an_update_needs_a_template_that_this_is_a_fork_of(
    template: Path, forked: Callable[..., Path], tmp_path: Path
) -> None:
    none = forked_python(template, "scripts/fork.py", "--update", str(template))
    assert (none.returncode, none.stderr.partition(":")[2][:36]) == (2, " there is no .template.toml here: th"[:36])
    fork = forked("zebra", history=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("something else\n")
    committed(tmp_path / "other")
    result = forked_python(fork, "scripts/fork.py", "--update", str(tmp_path / "other"))
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'other'}: it never was what .template.toml has as tree=")
    result = forked_python(fork, "scripts/fork.py", "--update", str(tmp_path / "nowhere"))
    assert (result.returncode, "nowhere" in result.stderr) == (2, True)
    assert git(fork, "status", "--porcelain") == ""
