"""W&B that cannot be reached, dies, forbids or is resumed: training goes on, and every row arrives in the end.

The client and `wandb sync` are the real ones; the server is a stub on this machine.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Callback
from tests import forked
from tests.polling import LIMIT, wait_until
from tests.runs import wandb_file
from tests.runs.wandb_server import Server, Uploaded

from ablab.errors import ConfigError
from ablab.lab.loggers.csv_file import MetricsCSV, read_rows
from ablab.lab.loggers.wandb import WandB

ROOT = Path(__file__).parents[2]
KEY = "a1b2c3d4e5" * 4
ID = "abcd1234"
SHORT = {"init_timeout": 2, "finish_timeout": 3}  # for a server that is ill; a well one may be slow on a busy machine
ILL = ["stalls", "resets", "errors", "forbids", "refuses"]


@pytest.fixture(autouse=True)
def _logged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account of nobody, and a W&B process for each test: it keeps to the server that it knew first."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    wandb.teardown()  # of tests elsewhere, which knew no server
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start servers; W&B's client talks to the last one."""
    servers = []

    def start(*arguments: Any, **choices: Any) -> Server:
        servers.append(Server(*arguments, **choices).__enter__())
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        return servers[-1]

    yield start
    for one in servers:
        one.stop()


def value(row: int) -> dict[str, float]:
    """What is logged in a row; the same whenever it is logged again. Two rows a step, as where validation is."""
    return {"val/loss": 1 / (row + 3), "epoch": 0} if row % 2 else {"train/loss": 1 / (row + 3), "epoch": 0}


def start(folder: Path, *, kept: int = 0, **choices: Any) -> tuple[MetricsCSV, WandB]:
    """The loggers of a run that is new, or resumed where it had logged `kept` rows."""
    folder.mkdir(exist_ok=True)
    rows = read_rows(folder)[:kept]
    online = {"project": "ablab", "mode": "online", "init_timeout": 60, "finish_timeout": 60}
    loggers = MetricsCSV(folder, rows=list(rows)), WandB(save_dir=folder, **{**online, **choices})
    loggers[1].begin(ID, rows)
    loggers[1].log_hyperparams({"model": {"num_layers": 3}})
    return loggers


def log(loggers: tuple[MetricsCSV, WandB], rows: range) -> None:
    for row in rows:
        for logger in loggers:
            logger.log_metrics(value(row), row // 2)


def close(loggers: tuple[MetricsCSV, WandB], exit_code: int = 0) -> None:
    loggers[0].save()
    loggers[1].close(exit_code)


def sync(printed: str) -> Uploaded:
    """Do what was printed, with a server that is well.

    Returns:
        what it has then.
    """
    [command] = re.findall(r"wandb (sync .+)", printed)
    with Server() as well:
        upload(shlex.split(command), well)
        return well.runs[ID]


def upload(words: list[str], well: Server) -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), *words],
        env={**os.environ, "WANDB_BASE_URL": well.url, "WANDB_SILENT": "false"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=True,
    )
    assert "Finished syncing" in result.stderr + result.stdout, result.stderr


def points(rows: list[dict[str, Any]], step: str) -> dict[tuple[int, str], float]:
    return {
        (int(row[step]), name): float(value)
        for row in rows
        for name, value in row.items()
        if name not in (step, "epoch", "val/sample") and value != ""
    }


def assert_complete(run: Uploaded, folder: Path) -> None:
    """Every point of metrics.csv, and no other; a row of it for each of the server's."""
    with (folder / "metrics.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert points(run.rows, "trainer/global_step") == points(written, "step")
    assert len(run.rows) == len(written)


def test_a_run_arrives_with_its_rows_config_and_exit_code(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    well = server()
    loggers = start(tmp_path / "run")
    log(loggers, range(20))
    close(loggers, 3)
    run = well.runs[ID]
    assert_complete(run, tmp_path / "run")
    assert run.history[3]["_step"] == 3
    assert (run.config["model"], run.exit_code) == ({"num_layers": 3}, 3)
    assert capsys.readouterr().out.strip() == f"W&B: online, {well.url}/someone/ablab/runs/{ID}"


@pytest.mark.parametrize(
    "ill", [pytest.param(ill, marks=[pytest.mark.thorough] * (ill in ("errors", "refuses"))) for ill in ILL]
)
def test_a_server_that_cannot_be_used_makes_it_an_offline_run(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str], ill: str
) -> None:
    server().stop() if ill == "refuses" else server(ill)
    loggers = start(tmp_path / "run", **SHORT)
    log(loggers, range(20))
    close(loggers)  # a server that stalls answers when the test is over: whatever waited for it would not come here
    printed = capsys.readouterr()
    assert "W&B: offline (the server cannot be used: " in printed.out
    assert printed.err == ""
    run = sync(printed.out)
    assert_complete(run, tmp_path / "run")
    assert (run.config["model"], run.exit_code) == ({"num_layers": 3}, 0)


@pytest.mark.parametrize(
    "ill", [pytest.param(ill, marks=[pytest.mark.thorough] * (ill in ("resets", "forbids"))) for ill in ILL]
)
def test_a_server_that_dies_mid_run_slows_nothing_and_loses_nothing(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str], ill: str
) -> None:
    dying = server(lines=5, then=ill if ill != "refuses" else "resets")
    loggers = start(tmp_path / "run", finish_timeout=3)
    log(loggers, range(10))
    wait_until(lambda: dying.mode != "healthy")
    if ill == "refuses":
        dying.stop()
    log(loggers, range(10, 1000))
    close(loggers, 1)
    assert 5 <= len(dying.runs[ID].lines) < 1000
    printed = capsys.readouterr()
    assert "W&B: not everything was uploaded (the server " in printed.out
    assert printed.err == ""
    run = sync(printed.out)
    assert_complete(run, tmp_path / "run")
    assert (run.config["model"], run.exit_code) == ({"num_layers": 3}, 1)


def test_syncing_to_the_server_that_died_adds_no_row_that_it_has(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dying = server(lines=5, then="errors")
    loggers = start(tmp_path / "run", finish_timeout=3)
    log(loggers, range(10))
    wait_until(lambda: dying.mode != "healthy")
    log(loggers, range(10, 20))
    close(loggers)
    dying.lines, dying.mode = None, "healthy"
    [command] = re.findall(r"wandb (sync .+)", capsys.readouterr().out)
    upload(shlex.split(command), dying)
    assert_complete(dying.runs[ID], tmp_path / "run")


def test_a_server_that_is_well_again_gets_the_rest_in_the_same_run(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shaky = server(lines=5, then="errors")
    loggers = start(tmp_path / "run")
    log(loggers, range(10))
    wait_until(lambda: shaky.mode != "healthy")
    log(loggers, range(10, 20))
    shaky.lines, shaky.mode = None, "healthy"
    close(loggers)
    assert_complete(shaky.runs[ID], tmp_path / "run")
    assert "not everything" not in capsys.readouterr().out


def test_one_sync_brings_all_of_an_offline_run_that_was_resumed(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    for kept, logged, exit_code in ((0, range(10), 75), (6, range(6, 12), 1), (8, range(8, 15), 0)):
        capsys.readouterr()
        loggers = start(folder, kept=kept, mode="offline")
        log(loggers, logged)
        close(loggers, exit_code)
    run = sync(capsys.readouterr().out)
    assert_complete(run, folder)
    assert len(run.history) == 15
    assert (run.config["model"], run.exit_code) == ({"num_layers": 3}, 0)
    assert run.summary["val/loss"] == value(13)["val/loss"]
    assert len(list((folder / "wandb" / "earlier").glob("*/*.wandb"))) == 2
    with Server() as well:  # all of W&B's folder at once, as those do who have many runs
        upload(["sync", "--include-synced", str(folder / "wandb")], well)
        assert len(well.runs[ID].history) == 15


@pytest.mark.parametrize(
    ("kept", "lost"),
    [(4, 3), (10, 0), *(pytest.param(*pair, marks=pytest.mark.thorough) for pair in ((4, 0), (10, 3)))],
)
def test_a_resumed_run_sends_the_server_what_it_lacks_and_nothing_twice(
    server: Callable[..., Server], tmp_path: Path, kept: int, lost: int
) -> None:
    well, folder = server(), tmp_path / "run"
    loggers = start(folder)
    log(loggers, range(10))
    close(loggers, 75)
    assert well.runs[ID].preempting
    well.runs[ID].forget(lost)
    loggers = start(folder, kept=kept)
    log(loggers, range(kept, 14))
    close(loggers)
    run = well.runs[ID]
    assert_complete(run, folder)
    assert len(run.history) == 14
    assert (run.config["model"], run.exit_code) == ({"num_layers": 3}, 0)


@pytest.mark.parametrize("ill", ["errors", pytest.param("refuses", marks=pytest.mark.thorough)])
def test_a_resumed_run_whose_server_is_away_is_complete_on_this_machine(
    server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str], ill: str
) -> None:
    well, folder = server(), tmp_path / "run"
    loggers = start(folder)
    log(loggers, range(10))
    close(loggers, 75)
    capsys.readouterr()
    well.lines, well.then = (12, "errors") if ill == "errors" else (None, "healthy")
    if ill == "refuses":
        well.mode = "errors"  # from the start; later the run is synced where it had begun
    loggers = start(folder, kept=8, **(SHORT if ill == "refuses" else {"finish_timeout": 3}))
    log(loggers, range(8, 15))
    wait_until(lambda: well.mode != "healthy")
    log(loggers, range(15, 20))
    close(loggers)
    well.mode, well.lines = "healthy", None
    [command] = re.findall(r"wandb (sync .+)", capsys.readouterr().out)
    upload(shlex.split(command), well)
    assert_complete(well.runs[ID], folder)


def test_a_text_goes_with_a_row_and_makes_none(server: Callable[..., Server], tmp_path: Path) -> None:
    well, folder = server(), tmp_path / "run"
    loggers = start(folder)
    log(loggers, range(4))
    loggers[1].log_text("val/sample", columns=["step", "text"], data=[[2, "<hello>"]])
    log(loggers, range(4, 6))
    close(loggers)
    assert_complete(well.runs[ID], folder)
    assert [row for row, content in enumerate(well.runs[ID].history) if "val/sample" in content] == [4]
    assert any(name.startswith("media/html/val/sample") for name in well.runs[ID].files)


def test_media_and_own_values_go_with_the_next_row_so_that_a_resume_shifts_none(
    server: Callable[..., Server], tmp_path: Path
) -> None:
    well, folder = server(), tmp_path / "run"
    loggers = start(folder)
    log(loggers, range(4))
    picture = torch.zeros(3, 4, 4)
    loggers[1].log_image("own/image", [picture], caption=["black"])
    loggers[1].log_text("own/text", columns=["a"], data=[["b"]])
    loggers[1].experiment.log({"own/value": 7}, step=1000)
    wandb.log({"own/other": 8}, commit=True)
    log(loggers, range(4, 6))
    close(loggers, 75)
    loggers = start(folder, kept=5)
    loggers[1].log_image("own/image", [picture])
    log(loggers, range(5, 12))
    loggers[1].experiment.log({"own/last": 9})
    close(loggers)
    rows = well.runs[ID].rows
    written = read_rows(folder)
    assert len(rows) == 12 + 1
    ours = [{name: value for name, value in row.items() if not name.startswith("own/")} for row in rows[:12]]
    assert points(ours, "trainer/global_step") == points(written, "step")
    where = {name: i for i, row in enumerate(well.runs[ID].history) for name in row if name.startswith("own/")}
    assert where == {
        "own/image": 4,
        "own/text": 4,
        "own/value": 4,
        "own/other": 4,
        "own/last": 12,
    }


def test_a_table_goes_with_the_next_row(tmp_path: Path) -> None:
    loggers = start(tmp_path / "run", mode="offline")
    log(loggers, range(3))
    loggers[1].log_table("own/table", columns=["a"], data=[[1]])
    log(loggers, range(3, 6))
    close(loggers)
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    rows = wandb_file.history(file)
    assert (len(rows), [i for i, row in enumerate(rows) if any("own/table" in name for name in row)]) == (6, [3])


def test_media_that_cannot_be_made_are_left_out_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loggers = start(tmp_path / "run", mode="offline")
    loggers[1].log_image("own/image", "no list")  # type: ignore[arg-type]
    loggers[1].log_audio("own/audio", [object()])
    loggers[1].log_video("own/video", [torch.zeros(1)], fps=[1, 2])
    log(loggers, range(4))
    close(loggers)
    printed = capsys.readouterr().out
    assert re.findall(r"W&B: (own/\w+) is left out \(", printed) == ["own/image", "own/audio", "own/video"]
    assert_complete(sync(printed), tmp_path / "run")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_where_wandbs_process_cannot_start_the_run_goes_on_and_callbacks_may_ask_for_wandb(
    run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    real = subprocess.Popen.__init__

    def init(self: Any, arguments: Any, *more: Any, **settings: Any) -> None:
        if "wandb-core" in str(arguments):
            raise error
        real(self, arguments, *more, **settings)

    monkeypatch.setattr(subprocess.Popen, "__init__", init)
    done = run("logger=wandb", "logger.wandb.mode=offline", "+callbacks.own._target_=tests.runs.test_wandb.Asking")
    assert done.printed.count("W&B: given up (") == 1
    assert json.loads((done.folder / "run.json").read_text())["status"] == "finished"
    assert wandb.run is None, "the next run of this process has its own"


class Asking(Callback):
    """Does with W&B what callbacks do."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        for logger in (trainer.loggers[1], pl_module.logger):
            assert isinstance(logger, WandB)
            run = logger.experiment
            run.log({"a": 1})
            run.summary["b"] = 2
            run.config.update({"c": 3})
            wandb.log({"d": 4})
            logger.watch(pl_module)
            logger.log_image("e", [torch.zeros(3, 4, 4)])
            logger.log_table("f", columns=["a"], data=[[1]])
            logger.log_text("g", columns=["a"], data=[["b"]])
            logger.log_metrics({"h": 5})
            logger.log_graph(pl_module)
            logger.save()
            logger.finalize("success")


def test_a_process_of_wandb_that_dies_under_watch_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Linear(2, 2)
    loggers = start(tmp_path / "run", mode="offline")
    loggers[1].watch(model, log="all", log_freq=1)
    wandb.teardown()
    for row in range(8):
        model(torch.ones(1, 2)).sum().backward()
        log(loggers, range(row, row + 1))
    close(loggers)
    assert capsys.readouterr().out.count("W&B: given up") == 1
    assert len(read_rows(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("project='lab/vision'", r"project=lab/vision: W&B takes no / in it; choose another name, such as lab-vision"),
        ("project='a?b#c'", r"project=a\?b#c: W&B takes no # \? in it"),
        (f"project={'a' * 129}", r"W&B takes at most 128 characters"),
        ("project=''", r"project: W&B needs one"),
        ("entity='team/project'", r"entity=team/project: W&B takes no /"),
        ("group=3", r"group=3: a text or null is needed"),
        ("notes=[a]", r"notes=.*: a text or null is needed"),
        (f"tags=[{'a' * 65}]", r"tags: 'a{65}' has 65 characters; W&B takes 1 to 64"),
        ("tags=['']", r"tags: '' has 0 characters"),
        ("tags=[a,b,a]", r"tags: a is given twice"),
        ("tags=[null]", r"tags=\[None\]: a list, each item a text"),
        ("tags=abc", r"tags"),
    ],
)
def test_names_that_wandb_refuses_are_refused_before_anything_is_written(
    run: Callable[..., SimpleNamespace], tmp_path: Path, word: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run("logger=wandb", f"logger.wandb.{word}")
    assert not list(tmp_path.glob("runs/*"))


def test_without_wandbs_process_the_run_goes_on_and_the_next_one_has_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = start(tmp_path / "run", mode="offline")
    log(loggers, range(4))
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True, check=True)
    [process] = found.stdout.split()
    os.kill(int(process), signal.SIGKILL)
    wait_until(lambda: ") Z " in Path(f"/proc/{process}/stat").read_text())  # its sockets are closed
    log(loggers, range(4, 20))
    loggers[1].log_text("val/sample", columns=["step", "text"], data=[["2", "hello"]])
    close(loggers)
    printed = capsys.readouterr()
    assert len(re.findall(r"W&B: given up \((?:ConnectionReset|BrokenPipe)Error", printed.out)) == 1
    assert len(read_rows(tmp_path / "run")) == 20
    loggers = start(tmp_path / "run", kept=20, mode="offline")
    close(loggers)
    assert_complete(sync(capsys.readouterr().out), tmp_path / "run")


@pytest.mark.slow
def test_points_are_on_the_disk_while_the_run_goes_on_so_that_a_kill_keeps_them(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.runs.test_wandb import log, start\n"
        "loggers = start(Path(sys.argv[1]), mode='offline')\nlog(loggers, range(10))\nloggers[0].save()\n"
        "time.sleep(3600)\n"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )

    def logged() -> int:
        files = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
        return sum(len(wandb_file.rows_of(wandb_file.read(file))) for file in files if file.stat().st_size)

    wait_until(lambda: logged() == 10, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    [folder] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert_complete(sync(f"wandb sync {folder}"), tmp_path / "run")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_no_file_has_a_secret(
    server: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    well, token = server(), "xyzzy-0123456789-plugh"
    monkeypatch.setenv("SOME_TOKEN", token)
    monkeypatch.setattr(sys, "argv", ["train.py", f"data.token={token}", f"key={KEY}"])
    loggers = start(tmp_path / "run", mode=mode)
    loggers[1].log_hyperparams({"data": {"token": token, "list": [KEY]}})
    log(loggers, range(10))
    close(loggers)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert not [secret for secret in (KEY, token) if secret.encode() in path.read_bytes()], path
    assert not [body for body in well.bodies if KEY.encode() in body or token.encode() in body]


WORDS = [
    *("trainer.limit_train_batches=20", "trainer.log_every_n_steps=1", "trainer.max_epochs=4"),
    *("trainer.limit_val_batches=2", "trainer.limit_test_batches=2"),
    *("logger=wandb", "logger.wandb.mode=online", "logger.wandb.init_timeout=60", "logger.wandb.finish_timeout=3"),
]


@pytest.mark.slow
def test_training_ends_well_where_its_server_does_not(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with Server(lines=5, then="stalls") as dying:
        result = command(*WORDS, WANDB_BASE_URL=dying.url)
        assert result.returncode == 0, result.stderr
        assert dying.mode == "stalls"
    [folder] = (tmp_path / "runs").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    [printed] = re.findall(r"wandb (sync .+)", result.stdout)
    with Server() as well:
        upload([str(tmp_path / word) if "/" in word else word for word in shlex.split(printed)], well)
        [run] = well.runs.values()
    assert run.name == record["id"]
    assert_complete(run, folder)
    assert (run.config["run"]["folder"], run.exit_code) == (str(folder), 0)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_is_one_run_with_every_row_once(
    command: Callable[..., subprocess.CompletedProcess[str]], server: Callable[..., Server], tmp_path: Path
) -> None:
    well = server()
    words = [*WORDS, "trainer.max_epochs=30"]  # it goes on for seconds after its first rows have arrived
    train = [sys.executable, str(Path(__file__).parents[2] / "train.py"), *words, f"output_dir={tmp_path}/runs"]
    process = forked.Popen(train, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(len(run.lines) > 5 for run in well.runs.values()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 75
    [folder] = (tmp_path / "runs").iterdir()
    [run] = well.runs.values()
    assert (run.preempting, run.exit_code) == (True, 75)
    sent = len(run.lines)
    result = command(f"resume={folder}")
    assert result.returncode == 0, result.stderr
    assert list(well.runs) == [json.loads((folder / "run.json").read_text())["id"]]
    assert len(run.lines) > sent
    assert len(run.history) == len(run.rows)
    assert_complete(run, folder)
    assert run.exit_code == 0


def test_one_command_sends_all_runs_that_were_offline_and_none_of_them_twice(
    server: Callable[..., Server], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / "ablation" / name).mkdir(parents=True)
        loggers = start(tmp_path / "ablation" / name, mode="offline")
        log(loggers, range(6))
        close(loggers)

    def send(folder: str = "ablation") -> subprocess.CompletedProcess[str]:
        words = [str(tmp_path / folder)]
        script = ROOT / "scripts" / "sync.py"
        return forked.run(script, words, folder=tmp_path, environment=os.environ, timeout=LIMIT)

    server("forbids")
    away = send()
    assert len(re.findall("could not be sent", away.stderr)) == 2
    assert (away.returncode, away.stdout.splitlines()[-1]) == (1, "0 sent, 0 had been before, 2 could not be")
    well = server()
    assert send().stdout.splitlines()[-1] == "2 sent, 0 had been before, 0 could not be"
    assert len(well.runs[ID].history) == 12  # of both, which have one id here
    again = send()
    assert (again.returncode, again.stdout) == (0, "0 sent, 2 had been before, 0 could not be\n")
    nothing = send("nowhere")
    assert (nothing.returncode, nothing.stderr) == (2, f"error: {tmp_path}/nowhere: there is no such folder\n")
