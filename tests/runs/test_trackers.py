"""TensorBoard and MLflow hold what metrics.csv does, each value once, however a run ends and goes on.

Both libraries are the real ones. mlflow-skinny can start no server: there a stub speaks its protocol, over MLflow's
own database.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tests import forked
from tests.polling import LIMIT, accepts_connections, wait_until
from tests.runs.mlflow_server import Server

from ablab.disk import Lock
from ablab.errors import ConfigError, Diverged
from ablab.lab.loggers import mlflow
from ablab.lab.loggers.csv_file import MetricsCSV, read_rows
from ablab.lab.loggers.mlflow import MLflow, opening
from ablab.lab.loggers.tensorboard import TensorBoard
from ablab.lab.loggers.wandb import WandB
from ablab.lab.run.resume import resume_config

ROOT = Path(__file__).parents[2]
BOTH = "logger=[tensorboard,mlflow]"
SHORT = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1"]
Points = dict[str, list[tuple[int, float]]]
Start = Callable[..., SimpleNamespace]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow makes its tables in 80 steps, each of which waits for the disk."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with opening(file):
        MlflowClient(f"sqlite:///{file}")
    return file


@pytest.fixture(autouse=True)
def _databases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_database: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    for place in (tmp_path, tmp_path / "runs"):
        shutil.copy(empty_database, place)


def written(folder: Path) -> Points:
    """Each metric of metrics.csv with its steps; the epoch, which is in every row, once a step."""
    found: dict[str, dict[int, float]] = {}
    for row in read_rows(folder):
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, {}).setdefault(int(row["step"]), float(value))
    return {name: list(values.items()) for name, values in found.items()}


def in_tensorboard(folder: Path) -> EventAccumulator:
    [file] = (folder / "tensorboard").iterdir()
    return EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()


def assert_in_tensorboard(folder: Path) -> EventAccumulator:
    events = in_tensorboard(folder)
    found = {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}
    rounded = {
        name: [(step, float(np.float32(value))) for step, value in points] for name, points in written(folder).items()
    }
    assert found == rounded
    return events


def in_mlflow(uri: str, name: str) -> tuple[Run, Points]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ablab")
    assert experiment is not None
    [run] = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_name == name]
    histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return run, {key: sorted((point.step, point.value) for point in points) for key, points in histories.items()}


def assert_in_mlflow(folder: Path, uri: str = "") -> Run:
    run, found = in_mlflow(uri or f"sqlite:///{folder.parent}/mlflow.db", folder.name)
    assert found == written(folder)
    return run


def hparams(events: EventAccumulator) -> Any:
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
    return metadata.parse_session_start_info_plugin_data(content).hparams


def status(events: EventAccumulator) -> Any:
    content = events.PluginTagToContent(metadata.PLUGIN_NAME).get(metadata.SESSION_END_INFO_TAG)
    return None if content is None else metadata.parse_session_end_info_plugin_data(content).status


def test_both_at_once_hold_the_values_the_config_and_the_end_of_a_run(run: Start) -> None:
    done = run(BOTH, "norm=groupnorm", *SHORT)
    events, there = assert_in_tensorboard(done.folder), assert_in_mlflow(done.folder)
    assert hparams(events)["norm._target_"].string_value == "ablab.norms.GroupNorm"
    assert hparams(events)["optimizer.lr"].number_value == done.cfg.optimizer.lr
    assert status(events) == STATUS_SUCCESS
    assert there.data.params["norm._target_"] == "ablab.norms.GroupNorm"
    assert there.data.params["run.data.fingerprint"] in (done.folder / "run.json").read_text()
    assert there.data.params["optimizer.lr"] == str(done.cfg.optimizer.lr)
    assert there.data.tags["ablab.id"] == json.loads((done.folder / "run.json").read_text())["id"]
    assert (there.info.status, there.info.run_name) == ("FINISHED", done.folder.name)
    assert not list(done.folder.rglob("*version_0*")) + list(done.folder.rglob("hparams.yaml"))


def test_a_run_that_is_stopped_and_resumed_is_one_run_with_each_step_once(
    stop: Callable[..., Path | None], tmp_path: Path
) -> None:
    from ablab.lab.train import train

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = stop("training_step", 6, BOTH, *SHORT, "trainer=cpu", f"logger.mlflow.tracking_uri={uri}")
    assert folder is not None
    assert assert_in_mlflow(folder, uri).info.status == "KILLED"
    assert status(assert_in_tensorboard(folder)) is None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    assert assert_in_mlflow(folder, uri).info.status == "FINISHED"
    assert status(assert_in_tensorboard(folder)) == STATUS_SUCCESS


def test_a_run_that_goes_wrong_has_failed(run: Start, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        run(BOTH, *SHORT, "trainer=cpu", "optimizer.lr=1e30", f"folder={tmp_path}/runs/wrong")
    assert assert_in_mlflow(tmp_path / "runs" / "wrong").info.status == "FAILED"
    assert status(assert_in_tensorboard(tmp_path / "runs" / "wrong")) == STATUS_FAILURE


# Row by row ---------------------------------------------------------------------------------------------------------


def value(row: int) -> dict[str, float]:
    """What is logged in a row; the same whenever it is logged again. Two rows a step, as where validation is."""
    return {"val/loss": 1 / (row + 3), "epoch": 0} if row % 2 else {"train/loss": 1 / (row + 3), "epoch": 0}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., list[Any]]:
    """The loggers of a run that is new, or resumed where it had logged `kept` rows."""

    def begin(*, kept: int = 0, **choices: Any) -> list[Any]:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        rows = read_rows(folder)[:kept]
        one = MLflow(save_dir=folder, experiment_name="ablab", **choices)
        loggers = [MetricsCSV(folder, rows=list(rows)), TensorBoard(save_dir=folder), one]
        for logger in loggers[1:]:
            logger.begin("abcd1234", rows)
            logger.log_hyperparams({"name": "sizes", "resume": kept or None, "cell": {"data.batch_size": 8}})
        return loggers

    return begin


def log(loggers: list[Any], rows: range) -> None:
    for row in rows:
        for logger in loggers:
            logger.log_metrics(value(row), row // 2)


def close(loggers: list[Any], exit_code: int = 0) -> None:
    loggers[0].save()
    for logger in loggers[1:]:
        logger.close(exit_code)


@pytest.mark.parametrize(("kept", "logged"), [(0, 12), (4, 12), (7, 12), (12, 12), (9, 3)])
def test_a_resumed_run_adds_what_is_missing_and_nothing_twice(
    start: Callable[..., list[Any]], tmp_path: Path, kept: int, logged: int
) -> None:
    """Rows may be there that the run does not keep, or not be there that it does: a kill takes what had to wait."""
    loggers = start()
    log(loggers, range(logged))
    loggers[0].save()
    if logged < kept:
        log(loggers[:1], range(logged, kept))
    close(loggers)
    before = {point.step: point.wall_time for point in in_tensorboard(tmp_path / "run").Scalars("train/loss")}
    loggers = start(kept=kept)
    log(loggers, range(kept, 16))
    close(loggers)
    there = assert_in_mlflow(tmp_path / "run")
    assert there.data.params["resume"] == "null", "MLflow changes no param"
    assert (there.data.tags["ablation"], there.data.tags["data.batch_size"]) == ("sizes", "8")
    after = assert_in_tensorboard(tmp_path / "run").Scalars("train/loss")
    kept_times = {point.step: point.wall_time for point in after if point.step in before and point.step < kept // 2}
    assert kept_times.items() <= before.items(), "what was logged before keeps its time"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as one:
        yield one


@pytest.mark.parametrize("ill", ["errors", "stalls", "deaf"])
def test_a_server_that_is_ill_for_a_while_gets_every_value_once(
    start: Callable[..., list[Any]],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ill: str,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a well one may be slow on a busy machine
    loggers = start(tracking_uri=server.url)
    log(loggers, range(4))
    loggers[2].send()
    server.mode, asked = ill, len(server.bodies)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    loggers[2].next = 0.0
    log(loggers, range(4, 2000))
    loggers[2].save()
    assert len(server.bodies) - asked < 20, "of 2000 rows the fewest wait for the server"
    assert loggers[2].problem
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    server.mode = "healthy"
    close(loggers)
    assert assert_in_mlflow(tmp_path / "run", server.url).info.status == "FINISHED"
    printed = capsys.readouterr()
    assert re.search(rf"MLflow: {server.url}/#/experiments/1/runs/\w{{32}}\n", printed.out)
    assert printed.out.count("MLflow") == 1
    assert printed.err == ""


def test_a_server_that_is_away_is_said_and_gets_the_run_when_it_is_back(
    start: Callable[..., list[Any]], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.mode = "errors"
    loggers = start(tracking_uri=server.url)
    log(loggers, range(6))
    close(loggers, 75)
    said = capsys.readouterr().out
    assert f"MLflow: {server.url} cannot be used (too many 500 error responses); it is tried again during" in said
    assert "MLflow: not everything has arrived (too many 500 error responses); metrics.csv has it" in said
    server.mode = "healthy"
    loggers = start(tracking_uri=server.url, kept=6)
    log(loggers, range(6, 8))
    close(loggers, 75)
    assert assert_in_mlflow(tmp_path / "run", server.url).info.status == "KILLED"


def test_no_secret_is_sent_or_written(
    start: Callable[..., list[Any]], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "xyzzy-0123456789-plugh"
    monkeypatch.setenv("SOME_TOKEN", token)
    loggers = start(tracking_uri=server.url, tags={"note": f"with {token}"})
    for logger in loggers:
        logger.log_hyperparams({"data": {"token": "quite-unknown", "list": [token]}})
    log(loggers, range(4))
    close(loggers)
    assert server.bodies
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (token, "quite-unknown"):
        assert not [content for content in [*written, *server.bodies] if secret.encode() in content]


def test_what_is_said_of_a_tracker_that_fails_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "xyzzy-0123456789-plugh")

    def fail() -> None:
        raise OSError("refused: xyzzy-0123456789-plugh, http://me:pa55@host\nmore")

    TensorBoard(save_dir=tmp_path / "run").attempt(fail)
    WandB(project="ablab", save_dir=tmp_path, mode="offline").give_up(OSError("no 'xyzzy-0123456789-plugh'\nmore"))
    said = capsys.readouterr().out
    assert [line.partition(":")[0] for line in said.splitlines()] == ["TensorBoard", "W&B"]
    assert said.count("***") == 3
    assert "xyzzy" not in said
    assert "pa55" not in said


class Asking(Callback):
    """Asks for a tracker's own object, as Lightning does, and uses it."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        assert pl_module.logger is trainer.loggers[1]
        assert hasattr(pl_module.logger, "experiment")
        pl_module.logger.experiment.add_scalar("own", 1.0, trainer.global_step)
        pl_module.logger.log_graph(pl_module)


def test_a_tensorboard_that_cannot_be_written_is_given_up_once_and_callbacks_may_ask_for_it(
    run: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    asking = "+callbacks.own._target_=tests.runs.test_trackers.Asking"
    well = run("logger=tensorboard", asking).folder
    assert [(point.step, point.value) for point in in_tensorboard(well).Scalars("own")] == [(1, 1.0)]

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", refuse)
    done = run("logger=tensorboard", asking)
    assert done.printed.count("TensorBoard: given up (PermissionError") == 1
    assert json.loads((done.folder / "run.json").read_text())["status"] == "finished"


def test_the_client_of_mlflow_is_the_one_of_lightnings_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MLflow(save_dir=".", experiment_name="a", tracking_uri="http://nowhere:1")
    logger.experiment.log_metric(logger.run_id, "a", 1.0)
    monkeypatch.setattr(logger, "client", client := MlflowClient("http://nowhere:1"))
    assert logger.experiment is client


def test_a_name_that_mlflow_does_not_take_is_changed(start: Callable[..., list[Any]], tmp_path: Path) -> None:
    loggers = start()
    loggers[2].log_metrics({"drift/a=1,b": 2.0, "train/loss": float("nan")}, 3)
    close(loggers)
    _, found = in_mlflow(f"sqlite:///{tmp_path}/mlflow.db", "run")
    assert found["drift/a_1_b"] == [(3, 2.0)]
    assert np.isnan(found["train/loss"][0][1])


def test_a_name_that_is_no_path_becomes_one_and_two_names_do_not_become_one(
    start: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = start()
    for step in range(2):
        loggers[2].log_metrics({"a//b": 1.0, "/x": 2.0, "../y": 3.0, "a,b": 4.0, "a=b": 5.0}, step)
    close(loggers)
    _, found = in_mlflow(f"sqlite:///{tmp_path}/mlflow.db", "run")
    assert {name: [value for _, value in points] for name, points in found.items()} == {
        "a/b": [1.0, 1.0],
        "x": [2.0, 2.0],
        "y": [3.0, 3.0],
        "a_b": [4.0, 4.0],
    }
    said = "MLflow: 'a=b' of the metrics is left out (as 'a_b' it would be one with 'a,b'); the run's folder has it\n"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.parametrize("where", ["file", "server"])
def test_what_mlflow_refuses_is_left_out_and_the_rest_arrives(
    start: Callable[..., list[Any]], server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    uri = server.url if where == "server" else f"sqlite:///{tmp_path}/mlflow.db"
    loggers, endless = start(tracking_uri=uri), "x" * 300
    for step in range(20):
        loggers[2].log_metrics({"train/loss": 1.0, endless: 2.0, "val/loss": 3.0}, step)
    close(loggers)
    run, found = in_mlflow(uri, "run")
    assert (run.info.status, {name: len(points) for name, points in found.items()}) == (
        "FINISHED",
        {"train/loss": 20, "val/loss": 20},
    )
    said = capsys.readouterr().out
    assert said.count(f"MLflow: '{endless}' of the metrics is left out (MLflow refuses it: ") == 1
    assert "not everything" not in said


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Another process's transaction in the database, which ends when it is committed."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)) as other:
        yield other


def test_a_database_that_stays_locked_is_given_up_and_has_the_run_when_it_is_resumed(
    start: Callable[..., list[Any]],
    locked: sqlite3.Connection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mlflow, "PATIENCE", 0.1)
    loggers = start()
    locked.execute("BEGIN EXCLUSIVE")
    log(loggers, range(6))
    close(loggers, 75)
    printed = capfd.readouterr()
    assert printed.out.endswith("MLflow: not everything has arrived (database is locked); metrics.csv has it\n")
    assert printed.err == ""
    locked.execute("COMMIT")
    loggers = start(kept=6)
    close(loggers)
    assert assert_in_mlflow(tmp_path / "run").info.status == "FINISHED"


def test_what_the_end_could_not_write_is_tried_once_more(
    start: Callable[..., list[Any]], locked: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow, "PATIENCE", 2.0)
    loggers = start()
    log(loggers, range(6))
    loggers[2].send()
    locked.execute("BEGIN EXCLUSIVE")

    def unlock() -> None:
        while not loggers[2].problem:
            time.sleep(0.01)
        locked.execute("COMMIT")

    loggers[2].problem = ""
    other = threading.Thread(target=unlock)
    other.start()
    close(loggers)
    other.join()
    assert assert_in_mlflow(tmp_path / "run").info.status == "FINISHED"


def test_who_waits_for_another_process_to_open_the_database_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mlflow.db"
    lock, said = Lock(file.with_name(f".{file.name}.lock")), io.StringIO()

    def unlock() -> None:
        while not said.getvalue():
            time.sleep(0.01)
        lock.release()

    lock.acquire()
    other = threading.Thread(target=unlock)
    other.start()
    with redirect_stdout(said), opening(file):
        pass
    other.join()
    assert "MLflow: waiting for another process that opens " in said.getvalue()


# Where it goes, and what is refused ---------------------------------------------------------------------------------


def test_the_database_is_beside_the_run_unless_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uri(**choices: Any) -> str:
        return MLflow(save_dir=tmp_path / "elsewhere" / "run", experiment_name="ablab", **choices).uri

    assert uri() == f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:mine@lab:5000")
    assert uri() == "http://me:mine@lab:5000"
    assert uri(tracking_uri="http://other:5000") == "http://other:5000"
    assert not (tmp_path / "elsewhere").exists(), "it is looked at before there is a run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("logger.mlflow.tracking_uri=runs/mlflow", "logger.mlflow.tracking_uri=runs/mlflow: give a server, http://"),
        ("logger.mlflow.tracking_uri=file:runs", "logger.mlflow.tracking_uri=file:runs: give a server, http://"),
        ("logger.mlflow.tracking_uri=http://me:mine@lab:5000", "logger.mlflow: tracking_uri: it has a password"),
        ("logger.mlflow.tracking_uri=http://ghp_0123@lab:5000", "logger.mlflow: tracking_uri: it has a password"),
        ("logger.mlflow.tracking_uri='http://lab/?token=0'", "logger.mlflow: tracking_uri: it has a password"),
    ],
)
def test_an_address_that_will_not_do_is_refused_before_there_is_a_run(
    run: Start, tmp_path: Path, words: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        run("logger=mlflow", words)
    assert not list((tmp_path / "runs").glob("*/"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("+logger.tensorboard.flush_sec=3", "logger.tensorboard.flush_sec: TensorBoard takes no such argument"),
        (
            "+logger.mlflow.experiment_nam=x",
            "logger.mlflow.experiment_nam: MLflow takes no such argument; did you mean",
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


def test_a_database_without_its_packages_is_refused(run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alembic", None)
    with pytest.raises(ConfigError, match=re.escape("logger.mlflow: a database file needs more packages: pip install")):
        run("logger=mlflow")


# As a person does it ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_says_how_to_look_at_it_and_nothing_else_is_on_the_screen(command: Command, tmp_path: Path) -> None:
    words = ["trainer=ddp_cpu", "trainer.max_epochs=1", *SHORT[1:], "folder=runs/mine"]
    plain = command("logger=csv", *words[:-1], "folder=runs/plain", PYTHONWARNINGS="default")
    result = command(BOTH, *words, PYTHONWARNINGS="default")
    assert (result.returncode, result.stderr) == (0, plain.stderr)
    said = [line for line in result.stdout.splitlines() if line not in plain.stdout]
    assert "TensorBoard: tensorboard --logdir runs/mine" in said
    assert any(line.startswith("MLflow: mlflow ui --backend-store-uri sqlite:///runs/mlflow.db") for line in said)
    waited = r"reading the data: \d+ s|epoch 1, .*"  # a slow machine says the first, and the second has its seconds
    [other] = [line for line in said if "runs/mine" not in line and not re.fullmatch(waited, line)]
    assert other.startswith("MLflow: ")
    assert not (tmp_path / "mlruns").exists()
    assert_in_tensorboard(tmp_path / "runs" / "mine")
    assert assert_in_mlflow(tmp_path / "runs" / "mine").info.status == "FINISHED"


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_told_apart_by_their_levels(command: Command, tmp_path: Path) -> None:
    result = command("-m", "norm=batchnorm,groupnorm", "seed=0,1", "trainer=smoke", "name=sweep_norm", BOTH)
    assert (result.returncode, result.stderr) == (0, "")
    folders = sorted(file.parent for file in (tmp_path / "runs" / "sweep_norm").glob("*/run.json"))
    assert len(folders) == 4
    for folder in folders:
        level, run = folder.name.partition(",")[0].removeprefix("norm="), assert_in_mlflow(folder)
        assert (run.data.tags["ablation"], run.data.tags["norm"]) == ("sweep_norm", level)
        assert hparams(assert_in_tensorboard(folder))["cell.norm"].string_value == level
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/sweep_norm/mlflow.db")
    assert len(client.search_runs(["1"], "tags.norm = 'groupnorm' and params.seed = '1'")) == 1


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_has_each_step_once(command: Command, tmp_path: Path) -> None:
    words = [BOTH, "trainer.max_epochs=12", "trainer.limit_train_batches=15", "folder=runs/killed"]
    words += ["trainer.log_every_n_steps=1"]
    folder = tmp_path / "runs" / "killed"
    process = forked.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(read_rows(folder)) >= 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = command("resume=runs/killed")
    assert (result.returncode, result.stderr) == (0, "")
    assert assert_in_mlflow(folder).info.status == "FINISHED"
    assert_in_tensorboard(folder)


@pytest.mark.slow
def test_tensorboard_itself_serves_the_scalars_and_the_config(run: Start, tmp_path: Path) -> None:
    done = run("logger=tensorboard", *SHORT, "trainer=cpu")
    [words] = re.findall(r"TensorBoard: (tensorboard .+)", done.printed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *arguments = shlex.split(words)
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *arguments, "--host=127.0.0.1", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(place: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{place}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.loads(answer.read())

    try:
        wait_until(lambda: accepts_connections(port))
        wait_until(lambda: ask("data/runs") == ["tensorboard"])
        for name in ("train/loss", "val/accuracy", "test/loss"):
            points = ask(f"data/plugin/scalars/scalars?run=tensorboard&tag={name}")
            wanted = [(step, float(np.float32(value))) for step, value in written(done.folder)[name]]
            assert [(step, float(np.float32(value))) for _, step, value in points] == wanted
        asked = {"allowedStatuses": ["STATUS_SUCCESS"], "colParams": [], "startIndex": 0, "sliceSize": 9}
        [session] = ask("experiment/e/data/plugin/hparams/session_groups", asked)["sessionGroups"]
        assert session["hparams"]["norm._target_"] == "ablab.norms.BatchNorm"
    finally:
        process.terminate()
        process.wait(LIMIT)
