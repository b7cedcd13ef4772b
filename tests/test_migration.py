"""docs/migration.md: the files that it shows work as they stand there, and the words that it names exist."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tests.repository import committed
from torch import nn

from ablab.data.digits import load_digits
from ablab.norms import BatchNorm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migration.md").read_text()
THERE, NETWORK, TASK, DATA = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MODEL_YAML, TASK_YAML, DATA_YAML, EXPERIMENT_YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
FILES = {
    "src/ablab/models/conv_net.py": NETWORK,
    "src/ablab/tasks/focal.py": TASK,
    "src/ablab/data/scans.py": DATA,
    "conf/model/conv_net.yaml": MODEL_YAML,
    "conf/task/focal.yaml": TASK_YAML,
    "conf/data/scans.yaml": DATA_YAML,
    "conf/experiment/scans.yaml": EXPERIMENT_YAML,
}


@pytest.fixture(scope="session")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the page's files where the page says they go, and a folder of scans."""
    project = tmp_path_factory.mktemp("moved")
    shutil.copy(ROOT / "train.py", project)
    for folder in ("conf", "src"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for place, content in FILES.items():
        assert f"`{place}`" in PAGE
        (project / place).write_text(content)
    images, labels = load_digits()
    (project / "scans").mkdir()
    for name, part in (("train", slice(0, 600)), ("test", slice(600, 900))):
        arrays = {"images": images[part].unsqueeze(1).numpy(), "labels": labels[part].numpy()}
        np.savez(project / "scans" / f"{name}.npz", **arrays)
    committed(project)  # a run warns where no commit can be recorded
    return project


@pytest.fixture
def start(moved: Path, tmp_path: Path, command: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    """Type a command in the copy, two steps a run; gives the records of its runs."""

    def run(*words: str, project: Path = moved) -> list[dict[str, Any]]:
        short = ["logger=csv", "trainer.max_epochs=1", "trainer.limit_train_batches=2", f"output_dir={tmp_path}/runs"]
        root = f"data.root={moved}/scans"
        result = command(
            *words, "experiment=scans", root, *short, script=f"{project}/train.py", PYTHONPATH=f"{project}/src"
        )
        assert (result.returncode, result.stderr) == (0, "")
        return [json.loads(file.read_text()) for file in (tmp_path / "runs").rglob("run.json")]

    return run


def test_the_moved_network_computes_what_the_old_one_does() -> None:
    there: dict[str, Any] = {}
    here: dict[str, Any] = {}
    exec(THERE, there)
    exec(NETWORK, here)
    old = there["ConvNet"](in_channels=1, width=16, num_classes=10)
    new = here["ConvNet"](in_channels=1, num_classes=10, norm=BatchNorm())
    new.load_state_dict({name.replace("bn", "norm"): value for name, value in old.state_dict().items()})
    images = torch.randn(8, 1, 8, 8)
    torch.testing.assert_close(new(images), old(images))
    torch.testing.assert_close(new.eval()(images), old.eval()(images))


def test_the_moved_network_reads_what_the_page_says() -> None:
    namespace: dict[str, Any] = {}
    exec(NETWORK, namespace)
    assert issubclass(namespace["ConvNet"], nn.Module)
    assert namespace["ConvNet"].takes == ("images",)


@pytest.mark.slow
def test_the_moved_experiment_takes_every_norm_by_one_word(start: Callable[..., Any], tmp_path: Path) -> None:
    norms = ["batchnorm", "evonorm_s0", "weightnorm"]
    records = start("-m", f"norm={','.join(norms)}", "seed=0", "trainer.limit_val_batches=2")
    assert len(records) == len(norms)
    assert all(0 < record["metrics"]["test/accuracy"] <= 1 for record in records)
    [config, *_] = [OmegaConf.load(file) for file in (tmp_path / "runs").rglob("config.yaml")]
    assert (config.model.width, config.data.batch_size, config.trainer.gradient_clip_val) == (32, 64, 0.5)
    assert config.optimizer._target_ == "torch.optim.Adam"


@pytest.mark.slow
def test_the_moved_loss_is_a_task(start: Callable[..., Any]) -> None:
    [record] = start("task=focal")
    assert record["metrics"]["test/loss"] < math.log(10), "sure samples count less, at chance too"


@pytest.mark.slow
def test_a_network_that_keeps_its_own_norms_trains_too(moved: Path, start: Callable[..., Any], tmp_path: Path) -> None:
    kept = re.sub(r'norm\((.*?), "image", activation=nn.ReLU\(\)\)', r"nn.BatchNorm2d(\1)", NETWORK)
    assert kept.count("nn.BatchNorm2d") == 2
    project = shutil.copytree(moved, tmp_path / "kept")
    (project / "src/ablab/models/conv_net.py").write_text(kept)
    [record] = start("norm=none", project=project)
    assert record["status"] == "finished"


HERE = re.findall(r"^\|[^|]*\|([^|]*)\|$", PAGE.split("## A network")[0], re.MULTILINE)
NAMED = {words for cell in HERE for words in re.findall(r"`('?\+?[a-z][\w./]*=[^`…]*)`", cell)}
WORDS = sorted(NAMED - {"experiment=NAME", "resume=runs/FOLDER"})


@pytest.mark.parametrize("words", WORDS)
def test_every_word_that_it_names_is_one(config: Callable[..., Any], words: str) -> None:
    multirun = ["hydra.mode=RUN"] if words.startswith("hydra/") else []
    root = ["data=imagefolder"] if "data.root" in words else []
    images = ["data=cifar10"] if "data/augment" in words else []
    assert config(*root, *images, *multirun, *shlex.split(words))


def test_every_make_target_it_names_here_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for cell in HERE for target in re.findall(r"`make ([a-z-]+)`", cell)} <= targets
