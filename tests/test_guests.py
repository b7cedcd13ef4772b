"""Modules that were not written for this project, by their names alone: train.py, resume, sweeps, processes, errors."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import forked
from tests.cluster.conftest import with_tests
from tests.polling import LIMIT, wait_until

from ablab.errors import ConfigError, RunError
from ablab.lab.evaluate import evaluate
from ablab.lab.run.checkpoint_files import list_checkpoints
from ablab.lab.run.resume import force_add_open_keys

ROOT = Path(__file__).parents[1]
DEMOS = "lightning.pytorch.demos.boring_classes"
OURS = "tests.exact.guests"
GUEST = ["task=lightning", f"++task._target_={OURS}.Regression", "data=lightning", f"++data._target_={OURS}.NoiseData"]
SHORT = ["trainer=cpu", "trainer.max_epochs=2", "trainer.log_every_n_steps=1"]
Run = Callable[..., SimpleNamespace]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_a_module_and_its_data_train_by_their_names(run: Run) -> None:
    done = run(*GUEST, *SHORT, "++task.hidden=4", "monitor.metric=valid_mae")
    assert done.cfg.monitor.mode == "min"
    about = record(done.folder)
    assert about["status"] == "finished"
    assert set(about["metrics"]) == {"valid_mae", "test_mse"}
    assert set(about["weights_sha256"]) == {"last", "best"}
    assert "data: NoiseData\nmodel: Regression, " in done.printed
    assert "best checkpoint by  valid_mae" in done.printed
    with (done.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"train_loss_step", "train_loss_epoch", "train_mae", "largest", "valid_mae"} <= set(rows[0])


def test_a_module_may_bring_everything_itself(run: Run) -> None:
    done = run("task=lightning", f"++task._target_={DEMOS}.BoringModel", "data=lightning", "trainer=smoke")
    assert (done.cfg.data, done.cfg.optimizer, done.cfg.scheduler, done.cfg.model) == (None, None, None, None)
    assert "data: BoringModel\nmodel: BoringModel, 66 parameters (layer 66)" in done.printed
    assert "last weights  monitor.metric=null, so none was chosen as the best" in done.printed


def test_a_module_without_an_optimizer_is_given_the_configs(run: Run) -> None:
    words = ["task=lightning", f"++task._target_={OURS}.WithoutOptimizer", "data=lightning"]
    data = [f"++data._target_={OURS}.Loaders", "++data.kind=two"]
    done = run(*words, *data, *SHORT, "optimizer=adamw", "optimizer.lr=0.5")
    assert done.cfg.optimizer.lr == 0.5
    other = run(*words, *data, *SHORT, "optimizer=adamw", "optimizer.lr=0.1")
    assert record(done.folder)["weights_sha256"] != record(other.folder)["weights_sha256"]


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_a_module_may_train_on_this_projects_data(run: Run) -> None:
    done = run("task=lightning", f"++task._target_={OURS}.OnDigits", "data=digits", *SHORT)
    assert record(done.folder)["status"] == "finished"


def test_keys_of_somebody_elses_class_need_no_plus() -> None:
    words = ["train.py", "task=lightning", "task.hidden=4", "data=digits", "data.batch_size=8", "~task.lr", "seed=1"]
    assert force_add_open_keys(words) == [
        *("train.py", "task=lightning", "++task.hidden=4", "data=digits", "data.batch_size=8", "~task.lr", "seed=1")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["++task.hiden=4"], "task.hiden: Regression takes no such argument; did you mean hidden?"),
        (["++task._target_=tests.exact.guests.Rows"], "task._target_=tests.exact.guests.Rows: a subclass of lightning"),
        (["++data._target_=tests.exact.guests.Rows"], "data._target_=tests.exact.guests.Rows: a subclass of lightning"),
        (["++task._target_=nothing.Here"], "task._target_=nothing.Here: there is no class or function Here in nothing"),
        (["callbacks=recalibration"], "callbacks.recalibration: Recalibration looks into this project's tasks"),
        (["trainer=fsdp", "trainer.accelerator=cpu"], "trainer=fsdp: it shards this project's models"),
        (["trainer.compile=default"], "trainer.compile=default: it compiles this project's models"),
    ],
)
def test_what_cannot_be_is_one_message_before_the_training(run: Run, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        run(*GUEST, *SHORT, *words)


def test_data_are_asked_for_where_the_module_has_none(run: Run) -> None:
    with pytest.raises(
        ConfigError, match=r"^data: Regression has no train_dataloader of its own; choose data=lightning"
    ):
        run("task=lightning", f"++task._target_={OURS}.Regression", "data=lightning")


def test_another_name_of_the_monitored_metric_is_one_message(run: Run) -> None:
    with pytest.raises(RunError, match=r"^monitor.metric=val_mae: the validation did not log it, but .*valid_mae; set"):
        run(*GUEST, *SHORT, "monitor.metric=val_mae")


def test_a_command_line_that_chooses_an_optimizer_for_nothing_is_refused(command: Any) -> None:
    words = [f"task._target_={DEMOS}.BoringModel", "optimizer=adamw"]
    done = command("task=lightning", "data=lightning", *words, "logger=csv")
    assert (done.returncode, done.stderr) == (
        2,
        "error: optimizer: BoringModel configures its own in configure_optimizers; leave optimizer= out, or remove "
        "that method\n",
    )


def environment() -> dict[str, str]:
    """The environment of a process that can import the tests' modules."""
    return {**os.environ, "PYTHONPATH": with_tests(os.environ), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return forked.run(ROOT / "train.py", words, folder=folder, environment=environment(), timeout=LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [pytest.param("cpu", marks=pytest.mark.thorough), "ddp_cpu"])
def test_a_killed_run_goes_on_to_the_same_bits(trainer: str, tmp_path: Path) -> None:
    words = [*GUEST, *SHORT, f"trainer={trainer}", "monitor.metric=valid_mae", "logger=csv", "trainer.max_epochs=4"]
    words = [
        word for word in words if word not in ("trainer=cpu", "trainer.max_epochs=2") or word == f"trainer={trainer}"
    ]
    assert start(tmp_path, *words, "output_dir=whole").returncode == 0
    often = "callbacks.checkpoints.every_n_steps=1"
    line = [sys.executable, str(ROOT / "train.py"), *words, often, "output_dir=killed"]
    killed = forked.Popen(line, cwd=tmp_path, env=environment())
    wait_until(lambda: list(tmp_path.glob("killed/*/checkpoints/*5-training.ckpt")), killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait(LIMIT)
    [run] = tmp_path.glob("killed/*")
    wait_until(lambda: subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False).returncode)
    assert start(tmp_path, f"resume={run}", "trust=true").returncode == 0
    [whole] = tmp_path.glob("whole/*")
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert record(run)["weights_sha256"] == record(whole)["weights_sha256"]
    assert record(run)["metrics"] == record(whole)["metrics"]


@pytest.mark.slow
def test_a_grid_of_a_modules_own_argument_has_a_report(tmp_path: Path) -> None:
    words = ["-m", "seed=0,1", "task.hidden=2,8", *(word.removeprefix("++") for word in GUEST)]
    words += ["logger=csv", *SHORT, "monitor.metric=valid_mae"]
    done = start(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    [folder] = (tmp_path / "runs").iterdir()
    report = (folder / "report" / "report.md").read_text()
    assert "4 of 4 runs finished" in done.stdout + report
    assert "valid_mae" in report


def test_a_run_of_a_module_is_scored_and_made_again_from_its_folder(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(*GUEST, *SHORT, "monitor.metric=valid_mae")
    assert evaluate(done.folder, trust=True) == {"test_mse": record(done.folder)["metrics"]["test_mse"]}
    last = evaluate(done.folder, weights="last", trust=True)
    assert last.keys() == {"test_mse"}
    with pytest.raises(ConfigError, match=r"^split=val: tests.exact.guests.Regression brings its own loaders"):
        evaluate(done.folder, split="val", trust=True)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", str(done.folder), "--trust"])
    capsys.readouterr()
    assert runpy.run_path(str(ROOT / "scripts" / "reproduce.py"))["main"]() == 0
    assert "equal to the bit: " in capsys.readouterr().out


def test_a_run_of_a_module_without_a_test_is_not_scored(run: Run) -> None:
    done = run(
        "task=lightning",
        f"++task._target_={OURS}.SumOfInputs",
        *GUEST[2:3],
        f"++data._target_={OURS}.Loaders",
        "++data.kind=two",
        "trainer=smoke",
    )
    with pytest.raises(ConfigError, match="SumOfInputs has no test_step, or there is no test_dataloader"):
        evaluate(done.folder, weights="last", trust=True)


def test_the_three_lines_of_the_page_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guests.md").read_text(), re.DOTALL)
    code = code.replace("L.Trainer(", "L.Trainer(accelerator='cpu', logger=False, enable_checkpointing=False, ")
    exec(code, {})
    assert [path.name for path in list_checkpoints(tmp_path / "runs" / "mine" / "checkpoints")][
        -1
    ] == "00000128-end.ckpt"
    exec(code, {})  # nothing is left to do
