"""What the tests share: the project's own config, and runs small enough to make many of."""

from __future__ import annotations

import copy
import fcntl
import gc
import importlib.metadata
import importlib.util
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from hydra import compose, initialize_config_dir
from hydra._internal.config_repository import ConfigRepository
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings
from lightning.fabric.utilities import registry
from omegaconf import DictConfig, OmegaConf
from playwright.sync_api import Browser, sync_playwright
from tests import forked
from tests.polling import LIMIT

from ablab.lab.config.schema import check_config
from ablab.lab.run import provenance

# The same examples in every run, however slow the machine: a test that fails now and then tells nobody anything.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")

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


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what stays for all tests: the libraries and thousands of items."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account, nothing left of other runs, the same random numbers for every test."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("ABLAB_CACHE", str(tmp_path / "cache"))
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
        cfg = copy.deepcopy(composed(words))
        check_config(cfg, ROOT / "conf" / "train.yaml")
        return cfg

    return make


@cache
def composed(words: tuple[str, ...]) -> DictConfig:
    """Compose the config of some overrides, once: it takes 0.4 s, and thousands of tests do."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        patch.setattr(ConfigRepository, "load_config", load_config)
        return compose("train", list(words))


yamls: dict[str, Any] = {}
read_yaml = ConfigRepository.load_config


def load_config(repository: ConfigRepository, config_path: str) -> Any:
    """Read each YAML once in all compositions: reading takes half of their time."""
    if config_path not in yamls:
        yamls[config_path] = read_yaml(repository, config_path)
    return copy.deepcopy(yamls[config_path])


# Of every run, these take a fifth of a second; neither the packages nor the repository change while tests run.
packages = cache(importlib.metadata.entry_points)
commit = cache(provenance.checkout)


@pytest.fixture
def run(config: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Train in this process, one step of everything unless told otherwise; CSV only unless told otherwise."""
    from ablab.lab.train import train

    def start(*words: str) -> SimpleNamespace:
        defaults = ["trainer=smoke", "logger=csv", f"output_dir={tmp_path}/runs"]
        groups = {word.split("=")[0] for word in words}
        words = (*(word for word in defaults if word.split("=")[0] not in groups), *words)
        cfg = config(*words)
        # a file and not a StringIO: a run's workers have its descriptor
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as stdout,
            redirect_stdout(stdout),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(registry, "entry_points", packages)
            patch.setattr(provenance, "checkout", commit)
            done = train(cfg)
            stdout.seek(0)
            printed = stdout.read()
        return SimpleNamespace(metrics=done.metrics, folder=done.folder, printed=printed, cfg=cfg, words=words)

    return start


@pytest.fixture
def stop(
    run: Callable[..., SimpleNamespace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path | None]:
    """A run that gets a signal in its k-th step of a kind; gives its folder, or None if it ends before."""
    from ablab.errors import Stopped
    from ablab.lab.run import signals
    from ablab.tasks.task import Task

    def start(step: str, k: int, *words: str) -> Path | None:
        passed, original = 0, getattr(Task, step)

        def count(self: Task, *arguments: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == k:
                signals.requested = signal.SIGTERM
            return original(self, *arguments)

        place = tmp_path / f"{step}{k}"
        with monkeypatch.context() as patch:
            patch.setattr(Task, step, count)
            try:
                run(*words, f"output_dir={place}")
            except Stopped:
                [folder] = place.iterdir()
                return folder
            finally:
                signals.requested = None
        return None

    return start


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py, or another script, as a user does, in another process and another folder."""

    def start(*words: str, script: str = "train.py", **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {**os.environ, **environment}
        if any(name.startswith("PYTHON") and name != "PYTHONPATH" for name in environment):  # Python has to see them
            program = [sys.executable, str(ROOT / script), *words]
            return subprocess.run(
                program, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        return forked.run(ROOT / script, words, folder=tmp_path, environment=settings, timeout=LIMIT)

    return start


@pytest.fixture
def terminal(tmp_path: Path) -> Callable[..., str]:
    """Run train.py on a terminal, and give all that it shows, control characters included."""

    def start(
        *words: str,
        program: tuple[str, ...] = (str(ROOT / "train.py"),),
        columns: int = 80,
        returncode: int = 0,
        **environment: str,
    ) -> str:
        here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        settings = {**os.environ, "TERM": "xterm", **environment}
        for name in ("COLUMNS", "LINES"):
            settings.pop(name, None)
        line = [sys.executable, *program, *words]
        start: Any = subprocess.Popen if program[0].startswith("-") else forked.Popen
        process = start(line, stdin=there, stdout=there, stderr=there, cwd=tmp_path, env=settings)
        os.close(there)
        shown = b""
        with suppress(OSError):  # the terminal is closed when the process ends
            while chunk := os.read(here, 4096):
                shown += chunk
        os.close(here)
        text = shown.decode()
        assert process.wait() == returncode, text
        return text.replace("\r\n", "\n")  # what a terminal makes of a line's end

    return start


@pytest.fixture
def faults() -> Any:
    """The fault harness scripts/faults.py as a module, which starts its runs by `forked.Popen`."""
    spec: Any = importlib.util.spec_from_file_location("faults", ROOT / "scripts" / "faults.py")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": forked.Popen})
    return module


@pytest.fixture
def last_weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The weights that a run's training ended with, from its folder."""
    from ablab.lab.run.checkpoint_files import list_checkpoints, model_weights, read

    return lambda folder: model_weights(read(list_checkpoints(folder / "checkpoints")[-1]))


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """A real data set that is not part of the project; the test is skipped where there is none."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {name}, which is not part of the project, in ../shared/data")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real data as data sets are served: parquet files as the Hub's, and a folder of class folders."""
    from pydoc_data.topics import topics

    import datasets
    import numpy as np
    import pandas as pd
    from PIL import Image

    from ablab.data.diabetes import Diabetes
    from ablab.data.digits import load_digits

    root = tmp_path_factory.mktemp("files")
    datasets.config.HF_DATASETS_CACHE = root / "cache"
    images, targets = load_digits()
    images, targets = (images * 15).numpy(), targets.tolist()
    label = datasets.ClassLabel(names=[f"class {digit}" for digit in range(10)])
    for split, rows in (("train", range(300)), ("validation", range(300, 400)), ("test", range(400, 500))):
        pictures = [Image.fromarray(images[i]).convert("RGB") for i in rows]
        labels = [targets[i] for i in rows]
        table = {"img": pictures, "image": pictures, "label": labels, "fine_label": labels}
        kinds = {"img": datasets.Image(), "image": datasets.Image(), "label": label, "fine_label": label}
        whole = datasets.Dataset.from_dict(table, datasets.Features(kinds))
        for part in range(2):  # as large data sets are served: in several files
            name = f"{split}-{part:05}-of-00002.parquet"
            whole.shard(2, part, contiguous=True).to_parquet(root / "images" / name)
        for i in rows if split != "validation" else ():
            folder = root / "folder" / split / label.names[targets[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(folder / f"{i:05}.png")
    for i, image in enumerate(images[:60]):  # a digit, its ink as a class of its own, its border ignored
        mask = np.where(image >= 60, 1, 0).astype(np.uint8)
        mask[[0, -1]] = 255
        for folder, pixels in (("images", image), ("masks", mask)):
            (root / "scenes" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "scenes" / folder / f"{i:05}.png")
    documents = [topics[name] for name in sorted(topics)]
    measured = Diabetes()
    rows = measured.load()["train"]
    patients = pd.DataFrame(rows.features, columns=measured.feature_names).assign(progression=rows.targets)
    patients["sex"] = patients["sex"].map({1: "m", 2: "f"})
    patients["is_old"], patients["is_heavy"] = (patients["age"] > 50).astype(int), (patients["bmi"] > 27).astype(int)
    patients.to_csv(root / "table.csv", index=False)
    for split, part in (("train", documents[:60]), ("validation", documents[60:70]), ("test", documents[70:])):
        datasets.Dataset.from_dict({"text": part}).to_parquet(root / "text" / f"{split}.parquet")
    return root


@pytest.fixture
def data_words(files: Path) -> Callable[[str], list[str]]:
    """What a data set needs on the command line where it has no default: files that are here.

    One that is not known here, and needs some, is skipped.
    """
    [aeon] = importlib.util.find_spec("aeon").submodule_search_locations  # type: ignore[union-attr]
    motions = Path(aeon) / "datasets" / "data" / "BasicMotions" / "BasicMotions"
    known = {
        "cifar10": [f"root={files}/images"],
        "cifar100": [f"root={files}/images"],
        "hf_image": [f"root={files}/images", "name=digits"],
        "hf_text": [f"root={files}/text", "name=topics"],
        "image_masks": [f"root={files}/scenes"],
        "imagefolder": [f"root={files}/folder"],
        "table": [f"train_file={files}/table.csv", "target=progression"],
        "table_classes": [f"train_file={files}/table.csv", "target=sex"],
        "table_labels": [f"train_file={files}/table.csv", "target=[is_old,is_heavy]"],
        "timeseries": [f"train_file={motions}_TRAIN.ts", f"test_file={motions}_TEST.ts"],
    }

    def words(choice: str) -> list[str]:
        if choice == "lightning":
            pytest.skip("brings no data of its own: tests/test_guests.py")
        own = OmegaConf.load(ROOT / "conf" / "data" / f"{choice}.yaml")
        missing = [] if choice in known else [str(key) for key in own if OmegaConf.is_missing(own, key)]
        if missing:
            pytest.skip(f"data={choice} needs data.{missing[0]}; data_words of tests/conftest.py can say which")
        return [f"data={choice}", "data.batch_size=8", *(f"data.{word}" for word in known.get(choice, []))]

    return words


@pytest.fixture
def batch() -> Callable[[str], Any]:
    """A real batch and the sizes that go with it: "images", "masks", "sequences", "vectors" or "text"."""
    return lambda kind, size=16: copy.deepcopy(example_batch(kind, size))


@cache
def example_batch(kind: str, size: int) -> Any:
    from ablab.data.breast_cancer import BreastCancer
    from ablab.data.digit_scenes import DigitScenes
    from ablab.data.digits import Digits
    from ablab.data.digits_rows import DigitsRows
    from ablab.data.text import Text

    data: Any = {
        "images": lambda: Digits(batch_size=size),
        "masks": lambda: DigitScenes(batch_size=size),
        "sequences": lambda: DigitsRows(batch_size=size),
        "vectors": lambda: BreastCancer(batch_size=size),
        "text": lambda: Text(batch_size=size, context_length=16),
    }[kind]()
    data.setup()
    return data.example(1), data.model_sizes


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser without a window: pages that the project writes are looked at in it."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium or Chrome")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()
