"""Who may import whom: read from the sources, so that a short cut fails here and not in a fork."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
HEAVY = {"torch", "lightning", "torchmetrics", "wandb", "sklearn", "datasets", "numpy"}

LIGHT = {"hydra", "omegaconf", "yaml"}  # libraries that are loaded in a moment
FILES = {"numpy", "pandas", "scipy", "sklearn", "datasets", "pyarrow", "PIL", "tokenizers", "mlxtend"}  # of data

# The research floor: what a room may import beside the standard library. The lab floor is in none of these lists.
RESEARCH = {
    "ablab.norms": {"torch", "ablab.norms"},
    "ablab.models": {"torch", "ablab.models"},
    "ablab.optim": {"torch", "ablab.optim"},
    "ablab.data": {
        *("torch", "lightning", *FILES),
        *("ablab.data", "ablab.digest", "ablab.disk", "ablab.errors", "ablab.status"),
    },
    "ablab.tasks": {
        *("torch", "lightning", "torchmetrics"),
        *("ablab.tasks", "ablab.data", "ablab.models.interface", "ablab.optim"),
    },
    "ablab.callbacks": {
        *("torch", "lightning", "PIL"),
        *("ablab.callbacks", "ablab.data", "ablab.disk", "ablab.errors", "ablab.norms", "ablab.screen", "ablab.tasks"),
        "ablab.status",
    },
    "ablab.digest": {"torch"},
    "ablab.disk": {"ablab.errors"},
    "ablab.errors": set(),
    "ablab.rank": set(),
    "ablab.screen": {"rich"},
    "ablab.status": {"ablab.rank"},
}

# Modules of the lab floor that are loaded before torch, or without it, and what they may import. Deeper rooms first.
QUICK = {
    "ablab.lab.browse.curves": set(),
    "ablab.lab.browse": LIGHT | {"ablab"},
    "ablab.lab.config.build": LIGHT | {"lightning", "ablab"},
    "ablab.lab.config.monitor": LIGHT | {"ablab"},
    "ablab.lab.config": LIGHT | {"ablab.errors", "ablab.lab.config", "ablab.rank", "ablab.screen"},
    "ablab.lab.loading": {"ablab.status"},
    "ablab.lab.run.folder": LIGHT | {"ablab"},
    "ablab.lab.run.identity": LIGHT | {"ablab"},
    "ablab.lab.run.redaction": LIGHT | {"ablab"},
    "ablab.lab.run.resume": LIGHT | {"ablab"},
    "ablab.lab.run.signals": {"ablab.errors", "ablab.rank"},
    "hydra_plugins": LIGHT | {"ablab"},
}
ALLOWED = RESEARCH | QUICK


STRUCTURE = runpy.run_path(str(SRC.parent / "scripts" / "structure.py"))
modules: Callable[[], dict[str, Path]] = cache(STRUCTURE["modules"])


def imports(file: Path, *, top_only: bool = False) -> set[str]:
    tree = ast.parse(file.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(module: str) -> str | None:
    return next((room for room in ALLOWED if within(module, room)), None)


@pytest.mark.parametrize("module", sorted(name for name in modules() if room_of(name)))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = room_of(module)
    assert room is not None
    strangers = {name for name in imports(modules()[module]) if not any(within(name, ok) for ok in ALLOWED[room])}
    assert not strangers, f"{module} is in {room}, which may not import {strangers}"


def test_every_module_is_on_one_of_two_floors() -> None:
    """The research floor never imports the lab floor, whatever a user adds to it."""
    floors = {*RESEARCH, "ablab.lab", "hydra_plugins"}
    assert not {name for name in modules() if name != "ablab" and not any(within(name, floor) for floor in floors)}
    research = [name for name in modules() if any(within(name, room) for room in RESEARCH)]
    climbing = {name for name in research if any(within(other, "ablab.lab") for other in imports(modules()[name]))}
    assert not climbing


def test_no_modules_import_each_other() -> None:
    """Imports within functions count: they would only hide a cycle."""
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in modules().items()}
    cycles = STRUCTURE["in_cycles"]({name: STRUCTURE["imported"](tree, modules()) for name, tree in trees.items()})
    assert not cycles, f"these import each other: {sorted(cycles)}"


def test_only_one_file_instantiates() -> None:
    calls = [name for name, file in modules().items() if "instantiate(" in file.read_text()]
    assert calls == ["ablab.lab.config.build"]


def test_wandb_is_imported_by_its_own_logger_alone() -> None:
    assert [name for name, file in modules().items() if "wandb" in imports(file)] == ["ablab.lab.loggers.wandb"]


def test_checking_a_config_loads_nothing_heavy() -> None:
    code = "import sys, ablab.lab.config.errors, ablab.lab.config.schema; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
