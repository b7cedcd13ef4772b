"""What is found in a folder of runs, damaged ones included, and that nothing in it is touched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ablab.errors import ConfigError
from ablab.lab.browse.collect import collect
from ablab.lab.browse.curves import MAX_POINTS, fit_to_page, read_curves, thinned_indices
from ablab.lab.browse.page import page
from ablab.lab.loggers.csv_file import read_rows

ROOT = Path(__file__).parents[2]


def by_name(content: dict[str, Any], part: str) -> dict[str, Any]:
    [entry] = [run for run in content["runs"] if part in run["name"]]
    return entry


def test_the_runs_of_a_folder_and_of_its_ablations_are_found(made: Path) -> None:
    content = collect(made)
    assert sorted(run["state"] for run in content["runs"]) == ["diverged", *["finished"] * 5]
    run = by_name(content, "norm=groupnorm,seed=1")
    record = json.loads((made / run["path"] / "run.json").read_text())
    assert run["ablation"] == "sweep_norm"
    assert run["metrics"] == record["metrics"]
    assert run["words"].items() >= {"norm": "groupnorm", "seed": "1", "trainer.max_epochs": "3"}.items()
    assert not {"logger", "name", "folder", "cell"} & run["words"].keys()
    assert (
        run["choices"].items()
        >= {"model": "resnet", "norm": "groupnorm", "data": "digits", "task": "classification"}.items()
    )
    assert run["choices"].items() <= record["choices"].items()
    assert not [group for group in record["choices"] if group.startswith("hydra")]
    assert run["epoch"] == 4
    assert run["problems"] == []
    hot = by_name(content, "_hot")
    assert "the loss is nan" in hot["error"]
    assert hot["metrics"] == {}


def test_a_choice_is_the_recorded_one_and_of_an_old_run_the_class(runs: Path) -> None:
    [folder] = runs.glob("*_hot")
    record = json.loads((folder / "run.json").read_text())
    recorded = {"norm": "none", "data": "digits_rows", "callbacks": ["default", "ema"], "logger": "csv", "scale": None}
    (folder / "run.json").write_text(json.dumps({**record, "choices": recorded}))
    expected = {"norm": "none", "data": "digits_rows", "callbacks": "[default,ema]"}
    assert by_name(collect(runs), "_hot")["choices"] == expected
    del record["choices"]
    (folder / "run.json").write_text(json.dumps(record))
    choices = by_name(collect(runs), "_hot")["choices"]
    assert choices.items() >= {"norm": "batchnorm", "data": "digits", "model": "resnet"}.items()


def test_an_ablation_comes_with_its_verdict_and_its_report(made: Path) -> None:
    [ablation] = collect(made)["ablations"]
    assert ablation["name"] == "sweep_norm"
    assert (ablation["planned"], ablation["missing"]) == (4, 0)
    assert any(verdict.startswith("groupnorm against batchnorm: ") for verdict in ablation["verdicts"])
    assert (made / ablation["report"]).exists()


def test_the_folder_of_an_ablation_can_be_given_itself(made: Path) -> None:
    content = collect(made / "sweep_norm")
    assert [run["ablation"] for run in content["runs"]] == ["sweep_norm"] * 4
    assert [ablation["name"] for ablation in content["ablations"]] == ["sweep_norm"]


def test_runs_that_an_ablation_has_not_begun_are_counted(runs: Path) -> None:
    file = runs / "sweep_norm" / "ablation.json"
    content = json.loads(file.read_text())
    content["runs"].append({"folder": "norm=none,seed=0_00000000", "cell": {"norm": "none"}, "seed": 0})
    file.write_text(json.dumps(content))
    assert collect(runs)["ablations"][0]["missing"] == 1


def test_what_configs_have_in_common_is_written_once(made: Path) -> None:
    content = collect(made)
    for run in content["runs"]:
        whole = {**content["config"], **run["config"]}
        for key in run["lacks"]:
            del whole[key]
        assert whole["seed"] == int(run["words"].get("seed", 0))
        assert len(run["config"]) < 20 < len(whole)
    assert "output_dir" in content["without_effect"]
    assert "optimizer.lr" not in content["without_effect"]


def test_curves_are_the_rows_of_metrics_csv(made: Path) -> None:
    folder = next(made.glob("sweep_norm/norm=batchnorm,seed=0*"))
    found, _ = read_curves(folder)
    rows = read_rows(folder)
    there = {name for row in rows for name in row if not name.startswith("test/")} - {"step", "epoch"}
    assert {name for _, values, _ in found for name in values} == there
    for steps, metrics, length in found:
        for name, values in metrics.items():
            expected = [(row["step"], row[name]) for row in rows if name in row]
            assert steps == [step for step, _ in expected]
            assert values == pytest.approx([value for _, value in expected], rel=1e-4)
            assert length == len(expected)


def test_a_row_that_is_being_written_is_left_out(runs: Path) -> None:
    folder = next(runs.glob("sweep_norm/norm=batchnorm,seed=0*"))
    before = read_curves(folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write("99,3,0.")
    assert read_curves(folder) == before


def test_a_long_curve_keeps_its_ends_and_few_points(tmp_path: Path) -> None:
    lines = ["step,epoch,train/loss", *(f"{step},0,{'nan' if step == 4999 else step / 7}" for step in range(5000))]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    [(steps, values, length)], epoch = read_curves(tmp_path)
    assert (len(steps), steps[0], steps[-1], length) == (MAX_POINTS, 0, 4999, 5000)
    assert values["train/loss"][-1] is None
    assert epoch is None
    assert thinned_indices(3, MAX_POINTS) == [0, 1, 2]


def test_very_many_curves_get_fewer_points() -> None:
    parts = [[list(range(200)), {f"norms/{i}": [0.0] * 200 for i in range(100)}, 200] for _ in range(300)]
    points = fit_to_page([{"curves": [part]} for part in parts])
    assert points == 25
    assert [parts[0][0][0], parts[0][0][-1], len(parts[0][0])] == [0, 199, 25]


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_no_run_is_touched(runs: Path, command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    before = snapshot(runs)
    assert command("--no-open", script="scripts/browse.py").stdout.startswith("runs/index.html: 6 runs, 1 ablations")
    after = snapshot(runs)
    assert after.keys() - before.keys() == {runs / "index.html"}
    assert all(after[path] == before[path] for path in before if path != runs)


def test_a_run_is_running_while_its_process_is_there(runs: Path) -> None:
    [folder] = runs.glob("*_hot")
    record = json.loads((folder / "run.json").read_text())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, long_ago = socket.gethostname(), "2020-01-01T00:00:00+0000"
    before = {"started": long_ago}  # the process that has the number now began later: it is another one
    for facts, state in (
        ({"pid": os.getpid(), "host": here}, "running"),
        ({"pid": os.getpid(), "host": here, **before}, "stopped"),
        ({"pid": os.getpid(), "host": here, **before, "resumed": [{"started": record["started"]}]}, "running"),
        ({"pid": os.getpid(), "host": here, "started": "yesterday"}, "running"),
        ({"pid": ended.pid, "host": here}, "stopped"),
        ({"pid": ended.pid, "host": "another-machine"}, "running"),
    ):
        (folder / "run.json").write_text(json.dumps({**record, "status": "running", **facts}))
        assert by_name(collect(runs), "_hot")["state"] == state, facts


def test_a_stopped_run_comes_with_the_command_that_goes_on(stop: Callable[..., Path]) -> None:
    folder = stop("training_step", 2, "trainer=cpu", "trainer.max_epochs=1")
    [run] = collect(folder.parent)["runs"]
    assert run["state"] == "stopped"
    name, text = run["commands"][0]
    assert name == "resume"
    assert text.startswith("python train.py ")
    assert str(folder) in text


def test_a_copied_run_is_a_run_of_its_own(runs: Path) -> None:
    [folder] = runs.glob("*_hot")
    shutil.copytree(folder, runs / "copy")
    keys = [run["key"] for run in collect(runs)["runs"]]
    assert len(set(keys)) == 7
    assert {"copy", folder.name} <= set(keys)


DAMAGES = {
    "a cut off record": ("run.json", '{"id": "x", "sta'),
    "a record that is a list": ("run.json", "[]"),
    "an empty record": ("run.json", ""),
    "a record of another program": ("run.json", '{"name": "mine"}'),
    "a record without end": ("run.json", "[" * 100_000),
    "a record of bytes": ("run.json", b"\xff\xfe\x00"),
    "no record": ("run.json", None),
    "a config that is no YAML": ("config.yaml", "a: [1"),
    "a config that is a word": ("config.yaml", "word"),
    "no config": ("config.yaml", None),
    "metrics that are no numbers": ("metrics.csv", "step,epoch,train/loss\n1,0,high\n"),
    "metrics of another program": ("metrics.csv", "time,value\n1,2\n"),
    "metrics of bytes": ("metrics.csv", b"\x00\xff\n"),
    "metrics of no size": ("metrics.csv", b""),
    "an epoch before the first": ("metrics.csv", "step,epoch,val/loss\n1,-1,0.5\n"),
    "an epoch of 400 digits": ("metrics.csv", f"step,epoch,val/loss\n1,{10**399},0.5\n"),
    "an epoch that is no number": ("metrics.csv", "step,epoch,val/loss\n1,NaN,0.5\n"),
    "a step that is half a one": ("metrics.csv", "step,epoch,val/loss\n1.5,0,0.5\n"),
    "a row without a step": ("metrics.csv", "step,epoch,val/loss\n,0,0.5\n"),
    "a column that is there twice": ("metrics.csv", "step,epoch,a,a\n1,0,0.5,0.5\n"),
    "a config that refers to itself": ("config.yaml", "a: &a [*a]\n"),
    "a config of a billion values": (
        "config.yaml",
        "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
    ),
    "a config without end": ("config.yaml", "[" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_listed_with_what_is_wrong(runs: Path, damage: str) -> None:
    [folder] = runs.glob("*_hot")
    name, content = DAMAGES[damage]
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = collect(runs)
    assert len(found["runs"]) == 6
    run = by_name(found, "_hot")
    assert any(name in problem for problem in run["problems"])
    assert run["state"] == "damaged"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "values",
    [
        {"metrics": {"x": 10**400}},
        {"metrics": {"x": "high"}},
        {"metrics": [1]},
        {"seconds": "long"},
        {"seconds": 10**400},
    ],
)
def test_one_bad_number_damages_one_run(runs: Path, values: dict[str, Any]) -> None:
    [folder] = runs.glob("*_hot")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **values}))
    found = collect(runs)
    assert [run["state"] for run in found["runs"]].count("damaged") == 1
    assert len(found["runs"]) == 6
    [problem] = by_name(found, "_hot")["problems"]
    assert problem.startswith("its run.json ")
    page(found)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link", "loop"])
@pytest.mark.parametrize("name", ["run.json", "metrics.csv", "config.yaml"])
def test_what_is_no_file_is_not_waited_for(runs: Path, name: str, kind: str) -> None:
    [folder] = runs.glob("*_hot")
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(file if kind == "loop" else folder / "nothing")
    found = collect(runs)
    assert len(found["runs"]) == 6
    run = by_name(found, "_hot")
    assert (run["state"], run["problems"]) == ("damaged", [f"its {name} cannot be read (it is no regular file)"])


def test_links_back_to_the_folder_list_no_run_twice(runs: Path) -> None:
    (runs / "back").symlink_to(runs)
    (runs / "above").symlink_to(runs.parent)
    (runs / "itself").symlink_to(runs / "itself")
    assert len(collect(runs)["runs"]) == 6


@pytest.mark.parametrize(
    "values",
    [
        {"status": "merry"},
        {"started": 3, "ended": None, "error": {"a": 1}, "overrides": "norm"},
        {"metrics": {"test/loss": float("nan"), "test/accuracy": None}, "seconds": float("inf"), "pid": "x"},
        {"data": [], "batch_sizes": {"optimizer": 0}, "id": None, "identity": 3},
    ],
)
def test_a_record_of_strange_values_is_no_traceback(runs: Path, values: dict[str, Any]) -> None:
    [folder] = runs.glob("*_hot")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **values}))
    run = by_name(collect(runs), "_hot")
    assert run["state"] == "damaged"
    assert any("its run.json" in problem for problem in run["problems"])
    json.dumps(run, allow_nan=False)


def test_a_run_that_ended_before_it_had_a_record_has_its_logs_last_line(runs: Path) -> None:
    folder = runs / "sweep_norm" / "norm=none,seed=0_00000000"
    folder.mkdir()
    (folder / "log.txt").write_text("data: Digits\nerror: no room\n")
    run = by_name(collect(runs), "norm=none")
    assert (run["state"], run["error"], run["problems"]) == ("failed", "no room", [])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"runs": [{}], "ablation": {}, "command": ""}', "[" * 100_000])
def test_a_damaged_ablation_is_listed_with_its_runs(runs: Path, content: str) -> None:
    (runs / "sweep_norm" / "ablation.json").write_text(content)
    found = collect(runs)
    [ablation] = found["ablations"]
    assert "ablation.json" in ablation["problems"][0]
    assert sum(run["ablation"] == "sweep_norm" for run in found["runs"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: there is no such folder; name the one that runs go to"),
        (["empty"], "empty: there is no run in it"),
        (["file"], "file: there is no such folder"),
    ],
)
def test_where_there_is_no_run_one_line_says_so(
    words: list[str], message: str, command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "empty" / "more").mkdir(parents=True)
    (tmp_path / "file").touch()
    result = command(*words, script="scripts/browse.py")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_the_folder_of_one_run_is_refused_and_stays_as_it_is(made: Path) -> None:
    [folder] = made.glob("*_hot")
    with pytest.raises(ConfigError, match="it is one run; name the folder that it is in"):
        collect(folder)


def test_without_a_display_the_path_is_all_that_happens(
    runs: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = command(str(runs), script="scripts/browse.py", DISPLAY="", WAYLAND_DISPLAY="", BROWSER="false")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.splitlines()) == 1
    assert (runs / "index.html").exists()
    assert not list(runs.glob(".index*"))


def test_collecting_loads_nothing_heavy() -> None:
    code = "import sys, ablab.lab.browse.collect, ablab.lab.browse.page; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "pandas", "wandb"} & set(loaded)


def test_a_wheel_has_the_parts_of_the_page() -> None:
    parts = {path.name for path in (ROOT / "src/ablab/lab/browse").glob("page.*")} - {"page.py"}
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert set(shipped["ablab.lab.browse"]) == parts
