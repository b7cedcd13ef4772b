"""The code of a run: every module and file that decides its result is in its hash, and nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ablab.lab.run import code
from ablab.lab.run.code import cache_hashes, code_of
from ablab.lab.run.identity import plain

MODULES = {
    "mylab/__init__.py": "",
    "mylab/loss.py": "from torch import nn\nfrom .parts import scale\n\n\nclass Loss(nn.Module):\n    pass\n",
    "mylab/parts.py": "import mylab_tools.deep\n\n\ndef scale():\n    from mylab import late\n    return late.SCALE\n",
    "mylab/late.py": "SCALE = 1.0\n",
    "mylab/star.py": "from mylab.more import *\n",
    "mylab/more/__init__.py": "__all__ = ['shapes']\n",
    "mylab/more/shapes.py": "",
    "mylab/named.py": "import importlib\n\nlate = importlib.import_module('mylab.late')\n",
    "mylab/broken.py": "def f(:\n",
    "mylab/unrelated.py": "",
    "mylab_tools/deep.py": "import json\nimport torch\n",  # a namespace package
    "single.py": "",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules of a user's own, on the path as by PYTHONPATH, and the working directory beside them."""
    for name, text in MODULES.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mylab", "mylab_tools", "single")]:
        monkeypatch.delitem(sys.modules, name)  # of another test, from another folder
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own"


def files(**config: Any) -> list[str]:
    """The names of what a config needs beside the package."""
    return list(code_of(config).files)


def test_the_packages_hash_is_that_of_its_source_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(code, "PACKAGE", tmp_path)
    before = code_of({})
    (tmp_path / "notes.md").write_text("no code")
    assert code_of({}) == before
    (tmp_path / "a.py").write_text("a = 2\n")
    assert code_of({}).digest != before.digest


def test_an_ordinary_run_has_the_packages_code_alone(config: Callable[..., Any]) -> None:
    cfg = plain(config("model=transformer", "experiment=none"))
    assert code_of(cfg).files == {}
    assert code_of(cfg).digest == code_of({}).digest


def test_a_module_counts_with_all_that_it_imports_from_the_project(project: Path) -> None:
    assert files(task={"loss": {"_target_": "mylab.loss.Loss"}}) == [
        "mylab/__init__.py",
        "mylab/late.py",
        "mylab/loss.py",
        "mylab/parts.py",
        "mylab_tools/deep.py",
    ]


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        ("mylab.loss.Loss.from_file", "mylab/loss.py"),
        ("mylab.star.Net", "mylab/more/shapes.py"),
        ("mylab.named.Net", "mylab/late.py"),
        ("mylab.broken.Net", "mylab/broken.py"),
        ("single.Net", "single.py"),
    ],
)
def test_a_module_is_found_however_it_is_named(project: Path, target: str, needed: str) -> None:
    assert needed in files(model={"_target_": target})
    assert needed in files(model={"_target_": "hydra.utils.get_method", "path": target})
    assert needed in files(model={"blocks": [{"_target_": target}]})


@pytest.mark.parametrize(
    "target", ["torch.optim.SGD", "json.loads", "nowhere.at.all", "sys.exit", "a.b", "ablab.norms.X"]
)
def test_installed_packages_and_the_standard_library_are_not_hashed(project: Path, target: str) -> None:
    assert files(model={"_target_": target}) == []


def test_an_installed_package_within_the_project_is_not_hashed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = project / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "theirs.py").write_text("")
    monkeypatch.syspath_prepend(installed)
    assert files(model={"_target_": "theirs.Net"}) == []


@pytest.mark.parametrize(
    ("changed", "counts"),
    [("mylab/loss.py", True), ("mylab/late.py", True), ("mylab_tools/deep.py", True), ("mylab/unrelated.py", False)],
)
def test_an_edit_counts_where_the_module_is_needed(project: Path, changed: str, counts: bool) -> None:
    config = {"task": {"loss": {"_target_": "mylab.loss.Loss"}}}
    before = code_of(config).digest
    with (project / changed).open("a") as file:
        file.write("# edited\n")
    assert (code_of(config).digest != before) == counts


def test_a_file_replaced_under_the_same_name_counts(project: Path) -> None:
    weights = project.parent / "pretrained.pt"
    weights.write_bytes(b"old")
    about = weights.stat()
    config = {"model": {"weights": "pretrained.pt"}}
    before = code_of(config)
    assert list(before.files) == ["pretrained.pt"]
    weights.write_bytes(b"new")
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))  # neither its size nor its time tells
    assert code_of(config).digest != before.digest
    (project.parent / "beside.pt").write_bytes(b"unrelated")
    weights.write_bytes(b"old")
    assert code_of(config) == before


def test_a_folder_that_the_config_names_counts_with_its_content(project: Path) -> None:
    folder = project.parent / "tokenizer"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "merges.txt").write_text("a b")
    (folder / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe")
    config = {"model": {"tokenizer": str(folder)}}
    before = code_of(config).digest
    (folder / "inner" / "merges.txt").write_text("a c")
    changed = code_of(config).digest
    assert changed != before
    (folder / "more.txt").write_text("")
    assert code_of(config).digest != changed


def test_of_a_very_large_folder_sizes_and_times_count(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "MOST_FILES", 1)
    folder = project.parent / "many"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("old")
    config = {"model": {"folder": "./many"}}
    before = code_of(config).digest
    assert code_of(config).digest == before
    (folder / "b").write_text("longer")
    assert code_of(config).digest != before


def test_the_datas_places_and_keys_without_effect_are_not_hashed(project: Path) -> None:
    (project.parent / "text.txt").write_text("data")
    text = str(project.parent / "text.txt")
    without = {"data": {"path": text, "root": text}, "resume": text, "folder": text, "logger": {"csv": {"file": text}}}
    assert files(**without, output_dir=text, name="text.txt") == []
    assert files(data={"tokens": text}) == [text]


@pytest.mark.parametrize(
    "value", ["", ".", "..", "/", "a\0b", "x" * 5000, "~nobody-is-called-so/x", "/dev/null", "a b.c", "\ud800"]
)
def test_a_value_that_names_no_file_is_no_trouble(project: Path, value: str) -> None:
    assert files(model={"value": value}) == []


def test_home_and_addresses_of_files_are_understood(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project.parent))
    (project.parent / "w.pt").write_bytes(b"w")
    assert files(model={"a": "~/w.pt", "b": f"file://{project.parent}/w.pt"}) == [
        f"file://{project.parent}/w.pt",
        "~/w.pt",
    ]


def test_a_sweep_hashes_once_and_the_next_launch_anew(project: Path) -> None:
    config = {"model": {"_target_": "single.Net"}}
    with cache_hashes():
        before = code_of(config).digest
        (project / "single.py").write_text("# edited\n")
        assert code_of(config).digest == before
    assert code_of(config).digest != before


CALLBACK = "import lightning as L\n\nfrom mylab import late\n\n\nclass Watch(L.Callback):\n    pass\n"


def test_a_resume_names_the_changed_module(
    project: Path,
    stop: Callable[..., Path],
    run: Callable[..., SimpleNamespace],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (project / "mylab" / "watch.py").write_text(CALLBACK)
    words = ("trainer.max_steps=4", "trainer.limit_train_batches=4", "trainer.max_epochs=1")
    folder = stop("training_step", 2, *words, "+callbacks.watch._target_=mylab.watch.Watch")
    assert folder is not None
    (project / "mylab" / "late.py").write_text("SCALE = 2.0\n")
    capsys.readouterr()
    run(*words, "+callbacks.watch._target_=mylab.watch.Watch", f"resume={folder}")
    assert "now; changed: mylab/late.py\n" in capsys.readouterr().err
