"""What a run leaves behind: its folder, its CSV, and a W&B run that says the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tests.runs import wandb_file

from ablab.lab.loggers.csv_file import MetricsCSV
from ablab.lab.loggers.wandb import logged_in
from ablab.lab.run.folder import new_folder

Start = Callable[..., SimpleNamespace]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def only(paths: Any) -> Path:
    [path] = paths
    return path


def test_a_runs_folder_holds_all_that_made_it(run: Start) -> None:
    done = run("name=mine", "norm=groupnorm")
    assert done.folder.name.endswith("_mine")
    names = {path.name for path in done.folder.iterdir()} - {"changes.patch", ".lock"}
    assert names == {"config.yaml", "run.json", "environment.json", "metrics.csv", "checkpoints"}
    assert {path.name for path in (done.folder / "checkpoints").iterdir()} == {
        "00000001-end.ckpt",
        "best.safetensors",
    }
    config = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert config["norm"]["_target_"] == "ablab.norms.GroupNorm"
    assert config["data"]["seed"] == 0, "interpolations are resolved"
    record = json.loads((done.folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["metrics"] == done.metrics
    environment = json.loads((done.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["threads"]["torch"] == torch.get_num_threads()


def test_every_metric_of_the_csv_is_in_the_offline_wandb_run_with_the_same_value(run: Start) -> None:
    done = run("logger=wandb", "trainer.limit_train_batches=12", "trainer.max_steps=24", "trainer.max_epochs=2")
    file = only(done.folder.glob("wandb/offline-run-*/*.wandb"))
    merged: dict[tuple[int, str], float] = {}
    for row in wandb_file.history(file):
        step = row.pop("trainer/global_step")
        merged |= {(step, name): value for name, value in row.items()}
    written = {
        (int(row["step"]), name): float(value)
        for row in rows(done.folder)
        for name, value in row.items()
        if name not in ("step", "epoch") and value
    }
    assert len(written) > 50
    assert {name for _, name in written} >= {"train/loss", "train/lr", "train/accuracy", "val/loss", "test/accuracy"}
    assert written == {key: value for key, value in merged.items() if key[1] != "epoch"}
    assert wandb_file.exit_code(file) == 0


def test_the_wandb_run_has_the_resolved_config_the_commit_and_the_folder(run: Start) -> None:
    done = run("logger=wandb", "norm=groupnorm", "seed=3")
    config = wandb_file.config(only(done.folder.glob("wandb/offline-run-*/*.wandb")))
    assert config["norm"]["num_groups"] == 8
    assert config["data"]["seed"] == 3
    assert config["run"]["folder"] == str(done.folder)
    assert config["run"]["git_commit"] == json.loads((done.folder / "run.json").read_text())["git_commit"]
    assert "W&B: offline (no login found)" in done.printed
    assert "upload later: wandb sync" in done.printed


def test_a_crashed_run_is_recorded_as_failed_everywhere(
    run: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ablab.tasks.classification import Classification

    def crash(*arguments: Any) -> None:
        raise RuntimeError("the power went")

    monkeypatch.setattr(Classification, "on_validation_epoch_end", crash)
    with pytest.raises(RuntimeError, match="the power went"):
        run("logger=wandb")
    folder = only((tmp_path / "runs").iterdir())
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: the power went")
    assert wandb_file.exit_code(only(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert rows(folder)[0]["train/loss"], "what was logged before the crash is there"


def test_two_runs_of_a_process_are_two_wandb_runs(run: Start) -> None:
    first, second = run("logger=wandb"), run("logger=wandb")
    files = [only(done.folder.glob("wandb/offline-run-*/*.wandb")) for done in (first, second)]
    assert files[0].name != files[1].name
    assert [wandb_file.exit_code(file) for file in files] == [0, 0]
    assert len(wandb_file.history(files[0])) == len(wandb_file.history(files[1]))


def test_ten_launches_in_the_same_second_make_ten_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(10) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path, "x"), range(10)))
    assert len(set(folders)) == 10
    assert all(folder.is_dir() for folder in folders)


def test_a_login_is_found_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    assert logged_in()


def test_values_of_the_csv_read_back_as_the_same_floats(tmp_path: Path) -> None:
    log = MetricsCSV(tmp_path, seconds=0)
    values = [1 / 3, 1e-300, float("inf"), -0.0]
    for step, value in enumerate(values):
        log.log_metrics({"a": value}, step)
    log.log_metrics({"b": 2.0}, 4)  # a new column rewrites the file
    log.save()
    read = rows(tmp_path)
    assert [float(row["a"]) for row in read[:4]] == values
    assert [row["b"] for row in read] == ["", "", "", "", "2.0"]
    assert list(read[0]) == ["step", "epoch", "a", "b"]
    assert not list(tmp_path.glob("*.tmp"))


def test_nothing_imports_wandb_with_logger_csv(command: Callable[..., Any]) -> None:
    result = command("trainer=smoke", "logger=csv", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0, result.stderr
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "lightning" in loaded
    assert "wandb" not in loaded
