"""The notebooks: each runs from top to bottom, leaves nothing behind, and lies in git as nobody has run it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def strip(*words: str | Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, ROOT / "scripts" / "strip_notebooks.py", *words]
    return subprocess.run(script, capture_output=True, text=True, check=False)


def repository() -> tuple[str, list[Path]]:
    """What git sees of the working tree, and the runs, which it ignores."""
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    return status.stdout, sorted((ROOT / "runs").glob("*"))


@pytest.mark.slow
@each
def test_it_runs_without_a_warning_and_leaves_the_repository_as_it_was(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):  # a person's own settings take no part
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = Path(shutil.copy(file, tmp_path))
    before = repository()
    notebook = nbformat.read(copy, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:  # its trainings are started as they stand, and end early
        if cell.source.startswith("%%bash\npython train.py"):
            assert " output_dir=" in cell.source
            few = " trainer.limit_train_batches=8 trainer.limit_val_batches=4 output_dir="
            cell.source = cell.source.replace("seed=0,1,2", "seed=0,1").replace(" output_dir=", few)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert repository() == before

    streams = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    ]
    assert [stream.text for stream in streams if stream.name == "stderr"] == []
    assert not any("\x1b" in stream.text for stream in streams), "a notebook is no terminal"

    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    nbformat.write(notebook, copy)
    assert strip("--check", copy).returncode == 1
    assert strip(copy).returncode == 0
    assert copy.read_text() == file.read_text()


def test_they_are_as_nobody_has_run_them() -> None:
    found = strip("--check")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    for file in NOTEBOOKS:
        for cell in nbformat.read(file, as_version=4).cells:
            assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@each
def test_it_defines_no_classes(file: Path) -> None:
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        code = ast.parse(TransformerManager().transform_cell(cell.source))
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(code)), cell.source


@each
def test_it_is_of_no_machine_and_its_links_lead_somewhere(file: Path) -> None:
    for cell in nbformat.read(file, as_version=4).cells:
        absolute = re.search(r"""(?:^|[\s"'=(:])(?:~?/\w|[A-Za-z]:\\)""", cell.source, re.MULTILINE)
        assert absolute is None, cell.source
        for target in re.findall(r"\]\(([^)]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert target.startswith("http") or (file.parent / target).exists(), target
        for path in re.findall(r"`((?:conf|docs|scripts|src|tests)/[\w/.]+)`", cell.source):
            assert (ROOT / path).exists() or "absnorm" in path, path
