"""What the tests share: the project's own config, and runs small enough to make many of."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ablab.config.schema import check

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # data sets that some machines have; tests that need them say so


def choices(group: str) -> list[str]:
    """The YAMLs of a group: a new one is tested by existing."""
    return sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `<group>_choice` runs once for each YAML of the group."""
    for name in metafunc.fixturenames:
        if name.endswith("_choice"):
            metafunc.parametrize(name, choices(name.removesuffix("_choice")))


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, nothing left of other runs, the same random numbers for every test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    torch.manual_seed(0)
    environment, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in set(os.environ) - set(environment):  # what launchers of several processes leave behind
        del os.environ[name]


@pytest.fixture
def config() -> Callable[..., DictConfig]:
    """Compose the project's config from command-line words, and check it."""

    def make(*words: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", list(words))
        check(cfg, ROOT / "conf" / "train.yaml")
        return cfg

    return make


@pytest.fixture
def run(config: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Train in this process, one step of everything unless told otherwise; CSV only unless told otherwise."""
    from ablab.train import train

    def start(*words: str) -> SimpleNamespace:
        defaults = ["trainer=smoke", "logger=csv", f"output_dir={tmp_path}/runs"]
        groups = {word.split("=")[0] for word in words}
        cfg = config(*(word for word in defaults if word.split("=")[0] not in groups), *words)
        printed = io.StringIO()
        with redirect_stdout(printed):
            metrics = train(cfg)
        [*_, folder] = sorted(Path(cfg.output_dir).iterdir(), key=lambda path: path.stat().st_mtime)
        return SimpleNamespace(metrics=metrics, folder=folder, printed=printed.getvalue(), cfg=cfg)

    return start


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py as a user does, in another process and another folder."""

    def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return start


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """A real data set that is not part of the project; the test is skipped where there is none."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {name}, which is not part of the project, in ../shared/data")
        return SHARED / name

    return find


@pytest.fixture
def batch() -> Callable[[str], Any]:
    """A real batch and the sizes that go with it: "images", "sequences" or "text"."""
    from ablab.data.digits import Digits
    from ablab.data.digits_rows import DigitsRows
    from ablab.data.text import Text

    def make(kind: str, size: int = 16) -> Any:
        data: Any = {
            "images": lambda: Digits(batch_size=size),
            "sequences": lambda: DigitsRows(batch_size=size),
            "text": lambda: Text(batch_size=size, context_length=16),
        }[kind]()
        data.setup()
        return data.example(1), data.model_sizes

    return make
