"""The commit of the code, and the patch that brings it to the code as it was, byte for byte, whatever git is set to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ablab.lab.run import git as module
from ablab.lab.run.git import Checkout, read_checkout

CODE = ("train.py", "src", "conf")
Git = Callable[..., bytes]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit, which no settings of this machine reach."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    root = tmp_path / "repository"
    for name, content in {
        "src/a.py": b"a = 1\n",
        "src/b.py": b"b = 1\n",
        "src/unended.py": b"x = 1",
        "src/crlf.txt": b"one\r\ntwo\r\n",
        "src/run.sh": b"true\n",
        "src/folder/inside.py": b"",
        "conf/train.yaml": b"seed: 0\n",
        "notes.txt": b"before\n",
        ".gitignore": b"data/\n*.log\n",
        ".gitattributes": b"*.txt diff=odd\n*.bin binary\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "src/link").symlink_to("a.py")
    git("init", "-q", at=root)
    git("add", "-A", at=root)
    git("commit", "-qm", "first", at=root)
    return root


def git(*words: str, at: Path, **environment: str) -> bytes:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    settings = {**os.environ, **environment}
    return subprocess.run(["git", *who, *words], cwd=at, env=settings, check=True, capture_output=True).stdout


def content_of(root: Path) -> dict[bytes, tuple[int, bytes]]:
    """Every file and link of the code, with its mode and content."""
    found = {}
    for folder, folders, names in os.walk(os.fsencode(root)):
        folders[:] = [name for name in folders if name not in (b".git", b"__pycache__")]
        for path in (os.path.join(folder, name) for name in [*names, *folders]):
            name = os.path.relpath(path, os.fsencode(root))
            if os.path.islink(path):
                found[name] = 0, os.readlink(path)
            elif os.path.isfile(path):
                found[name] = os.stat(path).st_mode & 0o100, Path(os.fsdecode(path)).read_bytes()
    return found


def restored(checkout: Checkout, repository: Path, tmp_path: Path) -> dict[bytes, tuple[int, bytes]]:
    """What a clone of the commit holds once the patch is applied, as docs/runs.md says."""
    (tmp_path / "changes.patch").write_bytes(checkout.patch())
    clean = {"GIT_CONFIG_GLOBAL": os.devnull}
    git("clone", "-q", str(repository), "again", at=tmp_path, **clean)
    git("checkout", "-q", str(checkout.commit), at=tmp_path / "again", **clean)
    git("apply", "--whitespace=nowarn", str(tmp_path / "changes.patch"), at=tmp_path / "again", **clean)
    return content_of(tmp_path / "again")


def make_odd_changes(root: Path) -> None:
    """Change files in every way that a patch may lose."""
    (root / "src/a.py").write_bytes(b"a = 2\n")
    (root / "src/b.py").unlink()
    (root / "src/unended.py").write_bytes(b"x = 2")
    (root / "src/crlf.txt").write_bytes(b"one\ntwo\r\n")
    (root / "src/run.sh").chmod(0o755)
    (root / "src/link").unlink()
    (root / "src/link").symlink_to("run.sh")
    (root / "src/folder/inside.py").unlink()
    (root / "src/folder").rmdir()
    (root / "src/folder").write_bytes(b"a file where a folder was\n")
    for name, content in {
        "größe.py": b"x = 1\n",
        'with space, "quotes" and \\.py': b"x = 1\n",
        "new\nline\t.py": b"x = 1\n",
        "crlf.py": b"x = 1\r\ny = 2\r\n",
        "latin.py": b"# caf\xe9\n",
        "mixed.py": b"a\r\nb\nc\rd\x0c\n  trailing  \n",
        "binary.bin": bytes(range(256)),
        "bom.py": b"\xef\xbb\xbfx = 1\n",
        "empty.py": b"",
        "no_newline.py": b"x = 1",
        "secret.py": b"access_token = read_token()\npassword='hunter22'\nurl = 'http://me:pw@host/'\n",
        "data/ignored.py": b"code that .gitignore names\n",
    }.items():
        (root / "src" / name).parent.mkdir(exist_ok=True)
        (root / "src" / name).write_bytes(content)
    with open(os.path.join(os.fsencode(root), b"src", b"latin-\xe9.py"), "wb") as file:
        file.write(b"x = 1\n")
    (root / "src/to_a_folder").symlink_to("../conf")
    (root / "src/dangling").symlink_to("nowhere")
    git("init", "-q", str(root / "src/nested"), at=root)
    (root / "src/nested/inner.py").write_bytes(b"in a repository of its own\n")


def test_the_patch_brings_the_commit_to_the_code_byte_for_byte(repository: Path, tmp_path: Path) -> None:
    before = read_checkout(repository, CODE)
    assert (str(before), before.patch()) == (git("rev-parse", "HEAD", at=repository).decode().strip(), b"")
    (repository / "notes.txt").write_text("after\n")
    assert read_checkout(repository, CODE).changes == {}, "notes are no code"
    (repository / "notes.txt").write_text("before\n")

    make_odd_changes(repository)
    (repository / "src/kept.log").write_bytes(b"ignored, and no code\n")
    after = read_checkout(repository, CODE)
    assert str(after) == f"{before.commit}+changes"
    objects = git("count-objects", "-v", at=repository)
    expected = content_of(repository)
    assert expected.pop(b"src/kept.log")
    assert restored(after, repository, tmp_path) == expected
    assert git("count-objects", "-v", at=repository) == objects, "nothing is written into the repository"


SETTINGS = {
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "diff.external": "/bin/echo",
    "diff.algorithm": "patience",
    "diff.renames": "copies",
    "diff.context": "0",
    "diff.relative": "true",
    "diff.ignoreSubmodules": "all",
    "diff.suppressBlankEmpty": "true",
    "diff.wsErrorHighlight": "all",
    "diff.odd.textconv": "tr a-z A-Z <",
    "color.ui": "always",
    "color.diff": "always",
    "core.quotePath": "false",
    "core.autocrlf": "true",
    "core.eol": "crlf",
    "core.safecrlf": "true",
    "core.precomposeUnicode": "true",
    "core.splitIndex": "true",
    "core.untrackedCache": "true",
    "status.showUntrackedFiles": "no",
    "apply.whitespace": "fix",
}


def test_no_setting_of_the_user_changes_the_patch(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_odd_changes(repository)
    plain = read_checkout(repository, CODE)
    files = {"core.excludesFile": str(tmp_path / "ignore"), "core.attributesFile": str(tmp_path / "attributes")}
    for key, value in {**SETTINGS, **files}.items():
        git("config", "--global", key, value, at=tmp_path)
    (tmp_path / "ignore").write_text("*.py\n*.yaml\n")
    (tmp_path / "attributes").write_text("*.py text eol=crlf ident filter=gone diff=odd\n")
    (repository / ".git/info/exclude").write_text("*.py\n")
    (repository / ".git/info/attributes").write_text("*.py working-tree-encoding=UTF-16 -diff\n")
    for name in ("src/b.py", "conf/train.yaml"):
        git("update-index", "--assume-unchanged", name, at=repository)
    # what hooks of git, and people, leave in the environment
    for name, value in {
        "GIT_DIR": "/nowhere",
        "GIT_INDEX_FILE": "/nowhere",
        "GIT_EXTERNAL_DIFF": "/bin/echo",
        "GIT_DIFF_OPTS": "--unified=0",
        "GIT_LITERAL_PATHSPECS": "1",
        "LANGUAGE": "de",
    }.items():
        monkeypatch.setenv(name, value)
    again = read_checkout(repository, CODE)
    assert again.changes == plain.changes
    assert str(again) == str(plain)
    patch = again.patch()
    assert b"diff --git a/src/b.py b/src/b.py\ndeleted file mode 100644\n" in patch
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_EXTERNAL_DIFF", "GIT_DIFF_OPTS", "GIT_LITERAL_PATHSPECS"):
        monkeypatch.delenv(name)
    assert restored(again, repository, tmp_path) == content_of(repository)


def test_a_mode_that_the_file_system_does_not_keep_is_no_change(repository: Path) -> None:
    (repository / "src/a.py").chmod(0o755)
    assert [*read_checkout(repository, CODE).changes] == [b"src/a.py"]
    git("config", "core.fileMode", "false", at=repository)
    assert read_checkout(repository, CODE).changes == {}


def test_the_code_may_be_a_folder_of_a_larger_repository(repository: Path, tmp_path: Path) -> None:
    (repository / "src/new.py").write_bytes(b"new\n")
    (repository / "src/a.py").unlink()
    (repository / "conf/train.yaml").write_bytes(b"outside\n")
    found = read_checkout(repository / "src", (".",))
    assert {*found.changes} == {b"new.py", b"a.py"}
    (repository / "conf/train.yaml").write_bytes(b"seed: 0\n")
    assert restored(found, repository, tmp_path) == content_of(repository)


def test_the_patch_holds_the_commit_of_a_submodule(repository: Path) -> None:
    git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(repository), "src/part", at=repository)
    git("commit", "-qam", "with a part", at=repository)
    assert read_checkout(repository, CODE).changes == {}
    git("commit", "-q", "--allow-empty", "-m", "further", at=repository / "src/part")
    found = read_checkout(repository, CODE)
    head = git("rev-parse", "HEAD", at=repository / "src/part").strip()
    assert found.changes == {b"src/part": (b"160000", head)}
    assert b"+Subproject commit " + head in found.patch()


def test_without_a_commit_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    place = tmp_path / "place"
    place.mkdir()
    assert read_checkout(place, CODE) == Checkout(place, None, "not a git repository")
    assert read_checkout(place, CODE).patch() == b""
    git("init", "-q", at=place)
    assert read_checkout(place, CODE).problem == "there is no commit yet"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_checkout(place, CODE).problem == "git is not installed"
    dubious = f"fatal: detected dubious ownership in repository at '{place}'\nTo add an exception ..."
    assert module.failure_reason(dubious, place) == (
        f"detected dubious ownership in repository at '{place}'; git config --global --add safe.directory {place}"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to somebody else")
def test_a_repository_of_somebody_else_is_named_with_the_remedy(repository: Path) -> None:
    for path in (repository, repository / ".git"):
        os.chown(path, 12345, 12345)
    assert read_checkout(repository, CODE).problem == (
        f"detected dubious ownership in repository at '{repository}'; git config --global --add "
        f"safe.directory {repository}"
    )
