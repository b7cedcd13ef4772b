"""Who may import whom: read from the sources, so that a short cut fails here and not in a fork."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
HEAVY = {"torch", "lightning", "torchmetrics", "wandb", "sklearn", "datasets", "numpy"}

# room: what it may import beside the standard library. Deeper rooms first.
ALLOWED = {
    "ablab.norms": {"torch", "ablab.norms"},
    "ablab.models": {"torch", "ablab.models"},
    "ablab.optim": {"torch", "ablab.optim"},
    "ablab.digest": {"torch"},
    "ablab.disk": set(),
    "ablab.data": {
        *("torch", "lightning", "numpy", "pandas", "scipy", "sklearn", "datasets", "pyarrow", "PIL", "tokenizers"),
        *("mlxtend", "ablab.data", "ablab.digest", "ablab.disk", "ablab.runs.outcome", "ablab.waiting"),
    },
    "ablab.tasks": {
        *("torch", "lightning", "torchmetrics", "ablab.tasks", "ablab.data", "ablab.optim"),
        "ablab.models.interface",
    },
    "ablab.exact.randomness": {"torch", "numpy", "ablab.data.draws"},
    "ablab.exact.state": {"torch", "lightning", "torchmetrics"},
    "ablab.exact.loaders": {"torch", "lightning", "numpy", "ablab.exact"},
    "ablab.exact.exact": {
        "torch",
        "lightning",
        "ablab.exact",
        "ablab.data",
        "ablab.internals",
        "ablab.optim",
        "ablab.tasks.counts",
    },
    "ablab.exact": {"lightning", "ablab"},
    "ablab.internals": {"torch", "lightning", "torchmetrics", "ablab.exact.state"},
    "ablab.guests": {"lightning", "omegaconf", "ablab"},
    "ablab.callbacks": {
        *("torch", "lightning", "ablab.callbacks", "ablab.data", "ablab.norms", "ablab.runs", "ablab.tasks"),
        *("ablab.screen", "ablab.waiting", "PIL"),
    },
    "ablab.config.errors": {
        *("hydra", "omegaconf", "yaml", "ablab.config.yaml_files", "ablab.runs.outcome", "ablab.runs.place"),
        "ablab.screen",
    },
    "ablab.config.schema": {"hydra", "omegaconf", "ablab.config"},
    "ablab.config.help": {"omegaconf"},
    "ablab.config": {"hydra", "omegaconf", "lightning", "yaml", "ablab.config"},
    "ablab.runs.outcome": set(),
    "ablab.runs.place": set(),
    "ablab.waiting": {"ablab.runs.place"},
    "ablab.loading": {"ablab.waiting"},
    "ablab.runs.signals": {"ablab.runs.outcome", "ablab.runs.place"},
    "ablab.member": {"omegaconf", "ablab"},
    "ablab.runs": {
        *("torch", "hydra", "omegaconf", "lightning", "wandb", "safetensors", "yaml"),
        *("tensorboard", "mlflow", "ablab.runs", "ablab.config.errors", "ablab.config.schema", "ablab.digest"),
        *("ablab.config.yaml_files", "ablab.disk", "ablab.waiting", "numpy"),
    },
    "ablab.browse": {
        *("yaml", "ablab.browse", "ablab.config.errors", "ablab.runs.folder", "ablab.runs.identity"),
        "ablab.runs.redaction",
    },
    "ablab.terminal": {"torch", "ablab.data", "ablab.norms", "ablab.runs"},
    "ablab.ablation": {
        *(
            "torch",
            "hydra",
            "omegaconf",
            "pandas",
            "scipy",
            "numpy",
            "matplotlib",
            "rich",
            "optuna",
            "hydra_plugins",
            "ablab",
        ),
    },
    "hydra_plugins": {"hydra", "omegaconf", "ablab.ablation", "ablab.loading"},
    "ablab.dry_run": {"torch", "lightning", "hydra", "omegaconf", "ablab"},
    "ablab.restorable": {"torch", "lightning", "ablab"},
    "ablab.evaluate": {"torch", "omegaconf", "ablab"},
    "ablab.predict": {"torch", "ablab"},
    "ablab.train": {"torch", "lightning", "omegaconf", "ablab"},
    "ablab.loop": {"torch", "lightning", "ablab.tasks"},
    "ablab.trainer": {"torch", "lightning", "ablab.callbacks", "ablab.loop", "ablab.tasks"},
    "ablab": set(),
}


def modules() -> dict[str, Path]:
    names = {}
    for file in SRC.rglob("*.py"):
        parts = file.relative_to(SRC).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


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


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room = next(room for room in ALLOWED if within(module, room))
    strangers = {name for name in imports(modules()[module]) if not any(within(name, ok) for ok in ALLOWED[room])}
    assert not strangers, f"{module} is in {room}, which may not import {strangers}"


def test_only_one_file_instantiates() -> None:
    calls = [name for name, file in modules().items() if "instantiate(" in file.read_text()]
    assert calls == ["ablab.config.build"]


def test_wandb_is_imported_by_its_own_logger_alone() -> None:
    assert [name for name, file in modules().items() if "wandb" in imports(file)] == ["ablab.runs.wandb"]


def test_checking_a_config_loads_nothing_heavy() -> None:
    code = "import sys, ablab.config.errors, ablab.config.schema; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not HEAVY & set(loaded)
