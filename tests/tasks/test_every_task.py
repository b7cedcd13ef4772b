"""What every task keeps, the shipped ones and those that somebody adds: on data and a model that go with it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from tests.conftest import choices
from tests.results import result

from ablab.data.datamodule import DataModule
from ablab.errors import ConfigError, Stopped
from ablab.lab.config.build import build
from ablab.lab.dry_run import unsupported_by
from ablab.lab.exact.checkpoints import Checkpoints
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run import signals
from ablab.lab.run.resume import resume_config
from ablab.lab.train import check_buildable, train

Start = Callable[..., SimpleNamespace]
FIRST = ["digits", "breast_cancer", "diabetes", "text", "table_labels"]  # tried first, in this order
SHORT = ["trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"]
SHORT += ["trainer.limit_val_batches=2", "trainer.limit_test_batches=1", "callbacks.samples.num_tokens=5"]


FOUND: dict[str, list[str]] = {}  # the words of each task, once a process


@pytest.fixture
def words_of(config: Callable[..., DictConfig], data_words: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """Return the words of a task with data and a model that go with it; what it brings itself comes first."""

    def pairs(task: type) -> Iterator[list[str]]:
        yield []
        models = sorted(choices("model"), key=lambda name: name not in ("resnet", "mlp", "rnn"))
        for name in [*FIRST, *(name for name in choices("data") if name not in FIRST)]:
            try:
                words = data_words(name)
            except pytest.skip.Exception:
                continue
            data: DataModule = build(config(*words).data)
            data.setup()
            if not unsupported_by(task, data):
                for model in models:
                    kind: Any = get_class(config(f"model={model}").model._target_)
                    if data.kind in kind.takes:
                        yield [f"model={model}", *words]

    def words(task: str) -> list[str]:
        if task == "lightning":
            pytest.skip("a command names its class: tests/test_guests.py")
        if task not in FOUND:
            for pair in pairs(get_class(config(f"task={task}").task._target_)):
                with suppress(ConfigError):
                    check_buildable(config(f"task={task}", *pair, "logger=csv"))
                    FOUND[task] = [f"task={task}", *pair]
                    break
            else:
                pytest.fail(f"no data and model of conf/ go with task={task}")
        return FOUND[task]

    return words


def test_it_logs_every_metric_that_it_declares(run: Start, words_of: Any, task_choice: str) -> None:
    done = run(*words_of(task_choice), *SHORT)
    logged = {name for row in read_rows(done.folder) for name in row}
    task: Any = get_class(done.cfg.task._target_)
    assert {f"val/{name}" for name in task.monitorable} <= logged
    assert done.cfg.monitor.metric in done.metrics
    assert any(name.startswith("test/") for name in done.metrics)


def test_a_stopped_run_goes_on_to_the_same_bits(
    run: Start, words_of: Any, task_choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(task_choice)
    expected = result(run(*words, *SHORT).folder)
    original, passed = Checkpoints.on_train_batch_end, 0

    def count(self: Checkpoints, trainer: L.Trainer, *arguments: Any) -> None:
        nonlocal passed
        passed += 1
        if passed == 4:
            signals.requested = signal.SIGTERM
        original(self, trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_batch_end", count)
        with pytest.raises(Stopped):
            run(*words, *SHORT, f"output_dir={tmp_path}/stopped")
    signals.requested = None
    [folder] = (tmp_path / "stopped").iterdir()
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    assert result(folder) == expected


def test_its_loss_falls_on_one_batch(run: Start, words_of: Any, task_choice: str) -> None:
    words = [*words_of(task_choice), "trainer=cpu", "trainer.overfit_batches=1", "trainer.max_epochs=40"]
    words += ["callbacks.samples.num_tokens=5"]
    rows = read_rows(run(*words, "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=40").folder)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if not losses:
        pytest.skip("it has losses of other names")
    assert losses[-1] < 0.8 * losses[0]
