"""Lightning's TensorBoard and MLflow loggers beside metrics.csv: resumed with a run, and never in its way."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from lightning.pytorch.loggers import CSVLogger
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ablab.errors import ConfigError, Diverged
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.loggers.trackers import shield
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train

BOTH = "logger=[tensorboard,mlflow]"
SHORT = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1"]
Points = dict[str, list[tuple[int, float]]]
Start = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: MLflow makes its tables in seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def _database(monkeypatch: pytest.MonkeyPatch, uri: str) -> Iterator[None]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield
    mlflow.set_tracking_uri(None)  # Lightning's logger has set it


def logged(folder: Path) -> Points:
    """Return the points of each metric in metrics.csv."""
    found: Points = {}
    for row in read_rows(folder):
        for name, value in row.items():
            if name not in ("step", "epoch"):
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def in_tensorboard(folder: Path) -> Points:
    """Return the scalars, as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"] if name != "epoch"
    }


def in_mlflow(folder: Path, uri: str) -> tuple[Run, Points]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ablab")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [run] = [run for run in runs if run.info.run_name == folder.name]
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics if key != "epoch"}
    return run, {key: sorted({(p.step, p.value) for p in points}) for key, points in histories.items()}


def assert_complete(folder: Path, uri: str) -> Run:
    """Compare both trackers with metrics.csv; TensorBoard has 32 bits."""
    run, points = in_mlflow(folder, uri)
    rows, shown = logged(folder), in_tensorboard(folder)
    assert points == rows
    assert shown.keys() == rows.keys()
    for name in rows:
        assert dict(shown[name]) == pytest.approx(dict(rows[name]), rel=1e-6)
    return run


def test_both_at_once_hold_the_metrics_and_the_config(run: Start, uri: str) -> None:
    done = run(BOTH, "norm=groupnorm", *SHORT, "name=both")
    there = assert_complete(done.folder, uri)
    assert there.data.params["norm/_target_"] == "ablab.norms.GroupNorm"
    assert there.data.params["optimizer/lr"] == str(done.cfg.optimizer.lr)
    assert there.info.status == "FINISHED"


def test_a_run_that_is_stopped_and_resumed_is_one_run_with_each_step_once(
    stop: Callable[..., Path | None], uri: str
) -> None:
    folder = stop("training_step", 6, BOTH, *SHORT, "trainer=cpu", "name=stopped")
    assert folder is not None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    assert assert_complete(folder, uri).info.status == "FINISHED"
    for points in in_tensorboard(folder).values():
        assert len({step for step, _ in points}) == len(points)


def test_a_run_that_diverges_has_failed_in_mlflow(run: Start, uri: str, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        run("logger=mlflow", *SHORT, "trainer=cpu", "optimizer.lr=1e30", f"folder={tmp_path}/wrong")
    assert in_mlflow(tmp_path / "wrong", uri)[0].info.status == "FAILED"


def test_a_tracker_that_fails_is_left_out_with_one_line_and_the_run_goes_on(
    run: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "mine").mkdir()
    (tmp_path / "taken").write_text("a file where TensorBoard would have its folder")
    words = ("logger.mlflow.tracking_uri=http://127.0.0.1:9", f"logger.tensorboard.version={tmp_path}/taken")
    done = run(BOTH, *words, *SHORT, f"folder={tmp_path}/mine")
    lines = [line for line in capsys.readouterr().err.splitlines() if "gets no more metrics" in line]
    assert sorted(line.split()[1] for line in lines) == ["MLFlowLogger", "TensorBoardLogger"]
    assert json.loads((done.folder / "run.json").read_text())["status"] == "finished"
    assert logged(done.folder)["train/loss"]


def test_the_message_of_a_tracker_that_fails_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "xyzzy-0123456789-plugh")

    class Failing(CSVLogger):
        num_calls = 0

        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            type(self).num_calls += 1
            raise OSError("refused: xyzzy-0123456789-plugh, http://me:pa55@host\nmore")

    logger = shield(Failing(tmp_path))
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
    [line] = capsys.readouterr().err.splitlines()
    assert line.count("***") == 2
    assert "xyzzy" not in line
    assert "pa55" not in line
    assert Failing.num_calls == 1


def test_no_secret_is_written(run: Start, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "xyzzy-0123456789-plugh"
    monkeypatch.setenv("SOME_TOKEN", token)
    done = run(BOTH, *SHORT, f"+logger.mlflow.tags.note={token}", "name=secret")
    database = Path(uri.removeprefix("sqlite:///")).read_bytes()
    assert b"secret" in database
    params = in_mlflow(done.folder, uri)[0].data.params
    assert token not in repr(params)
    assert not [path for path in done.folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def test_any_logger_of_lightning_takes_the_runs_folder(run: Start) -> None:
    done = run("logger=csv", "+logger.own._target_=lightning.pytorch.loggers.CSVLogger", "+logger.own.name=own", *SHORT)
    assert list((done.folder / "own").glob("version_0/metrics.csv"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "+logger.mlflow.experiment_nam=x",
            "logger.mlflow.experiment_nam: MLFlowLogger takes no such argument; did you mean",
        ),
        ("logger.mlflow.tags=5", "logger.mlflow.tags=5: "),
    ],
)
def test_a_key_that_is_misspelt_is_refused(config: Callable[..., DictConfig], words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(BOTH, words)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_package_that_is_missing_is_named_with_its_remedy(
    config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    message = f"logger.{name}: it needs {name}, which is not installed; pip install -e '.[trackers]'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(f"logger={name}")
    config("logger=csv")
