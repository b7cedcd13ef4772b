"""Ablations that really run: every run once, whatever fails, is interrupted or done twice at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from tests import forked
from tests.polling import LIMIT, wait_until

from ablab.errors import ConfigError
from ablab.lab.ablation.grid import Grid
from ablab.lab.launch import local, slurm

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]
SMALL = (
    *("logger=csv", "trainer.max_epochs=1", "trainer.limit_train_batches=6", "trainer.limit_test_batches=2"),
    *("trainer.log_every_n_steps=1", "trainer.limit_val_batches=2"),
)
GRID = ("ablation=norm_batch_size", "norm=batchnorm,groupnorm", "data.batch_size=8,32", "seed=1", *SMALL)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What the runs of an ablation have recorded, by their folders."""
    return {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/run.json")}


def outcomes(folder: Path) -> dict[str, Any]:
    """What must be equal to the bit."""
    found = records(folder)
    return {
        name: (
            record["status"],
            record["metrics"],
            record["weights_sha256"],
            (folder / name / "metrics.csv").read_text(),
        )
        for name, record in found.items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small grid, run in one go."""
    place = tmp_path_factory.mktemp("undisturbed")
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    done = forked.run(ROOT / "train.py", GRID, folder=place, environment=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "norm_batch_size"


def test_every_run_of_a_grid_is_done_and_found_again(undisturbed: Path) -> None:
    asked = json.loads((undisturbed / "ablation.json").read_text())
    found = records(undisturbed)
    assert sorted(run["folder"] for run in asked["runs"]) == sorted(found)
    assert len(found) == 4
    assert {record["status"] for record in found.values()} == {"finished"}
    assert len({record["weights_sha256"]["last"] for record in found.values()}) == 4
    for run in asked["runs"]:
        config = (undisturbed / run["folder"] / "config.yaml").read_text()
        assert f"norm: {run['cell']['norm']}" in config
        assert f"batch_size: {run['cell']['data.batch_size']}" in config
        assert "best checkpoint by" in (undisturbed / run["folder"] / "log.txt").read_text()


def test_a_run_of_a_grid_is_the_run_that_its_own_command_makes(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    name = next(name for name in records(undisturbed) if name.startswith("norm=groupnorm,batch_size=8,seed=1"))
    alone = ("norm=groupnorm", "data.batch_size=8", "optimizer.lr=0.025", "model.width=8", "seed=1", *SMALL)
    assert command(*alone).returncode == 0
    [other] = outcomes(tmp_path / "runs").values()
    assert other == outcomes(undisturbed)[name]


def test_the_same_command_again_trains_nothing(command: Command, undisturbed: Path) -> None:
    before = outcomes(undisturbed), {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/metrics.csv")}
    result = command(*GRID, f"output_dir={undisturbed.parent}")
    assert result.returncode == 0, result.stderr
    assert "finished (" not in result.stdout
    assert before == (
        outcomes(undisturbed),
        {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/metrics.csv")},
    )


def test_several_processes_find_what_one_does(command: Command, undisturbed: Path, tmp_path: Path) -> None:
    result = command(*GRID, "hydra.launcher.num_processes=2")
    assert result.returncode == 0, result.stderr
    assert outcomes(tmp_path / "runs" / "norm_batch_size") == outcomes(undisturbed)


def start(place: Path, *words: str) -> forked.Popen:
    return forked.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_two_launches_at_once_do_every_run_once(undisturbed: Path, tmp_path: Path) -> None:
    launches = [start(tmp_path, *GRID) for _ in range(2)]
    printed = [launch.communicate(timeout=LIMIT)[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], printed
    assert outcomes(tmp_path / "runs" / "norm_batch_size") == outcomes(undisturbed)
    assert not [record for record in records(tmp_path / "runs" / "norm_batch_size").values() if "resumed" in record]
    lines = [line for line in "".join(printed).splitlines() if ": finished (" in line]
    assert len([line for line in lines if "(in another launch)" not in line]) == 4, lines


def wait_for_a_run(launch: forked.Popen, folder: Path) -> None:
    """Until a run of a launch goes on."""
    wait_until(lambda: "running" in {record["status"] for record in records(folder).values()}, launch)


@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_a_signal_stops_an_ablation_and_the_same_command_goes_on(
    command: Command, undisturbed: Path, tmp_path: Path, num_processes: int
) -> None:
    words = (*GRID, f"hydra.launcher.num_processes={num_processes}")
    launch, folder = start(tmp_path, *words), tmp_path / "runs" / "norm_batch_size"
    wait_for_a_run(launch, folder)
    launch.send_signal(signal.SIGTERM)
    printed, _ = launch.communicate(timeout=LIMIT)
    assert launch.returncode == 75, printed
    assert len(records(folder)) < 4
    assert "running" not in {record["status"] for record in records(folder).values()}
    result = command(*words)
    assert result.returncode == 0, result.stderr
    assert outcomes(folder) == outcomes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", ["1", pytest.param("2", marks=pytest.mark.thorough)])
def test_an_ablation_that_is_killed_again_and_again_is_the_same_in_the_end(
    faults: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_processes: str
) -> None:
    line = ["--kills", "2", "--processes", num_processes, "--ablation", *GRID[0].split("=")[1:], *GRID[1:]]
    monkeypatch.setattr(sys, "argv", ["faults.py", *line])
    assert faults.main() == 0
    assert "4 of 4 runs equal to the bit" in capsys.readouterr().out


FAULTY = ("-m", "+callbacks.bug._target_=tests.ablation.faulty.Fine,tests.ablation.faulty.Raises", "seed=0,1", *SMALL)


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_run_that_fails_is_reported_in_the_end_and_does_not_stop_the_others(
    command: Command, tmp_path: Path, num_processes: int
) -> None:
    words = (*FAULTY, "name=faulty", f"hydra.launcher.num_processes={num_processes}")
    result = command(*words, PYTHONPATH=str(ROOT))
    found = records(tmp_path / "runs" / "faulty")
    assert sorted(record["status"] for record in found.values()) == ["failed", "failed", "finished", "finished"]
    assert result.returncode == 1
    assert "2 of 4 runs failed" in result.stderr
    assert "RuntimeError: a bug in the second step" in result.stderr
    assert "log.txt" in result.stderr
    again = command(*words, PYTHONPATH=str(ROOT))
    assert again.stdout.count(": failed (") == 2, "what failed is tried again"
    assert ": finished (" not in again.stdout


def test_a_run_that_diverges_is_counted_and_not_tried_again(command: Command, tmp_path: Path) -> None:
    words = ("-m", "optimizer.lr=0.1,1e30", "norm=none", "seed=0", "name=sweep_lr", *SMALL)
    result = command(*words)
    assert result.returncode == 0, result.stderr
    found = records(tmp_path / "runs" / "sweep_lr")
    assert sorted(record["status"] for record in found.values()) == ["diverged", "finished"]
    assert "1 diverged" in result.stdout
    assert "diverged (" not in command(*words).stdout


def test_when_all_diverge_it_is_said(command: Command) -> None:
    result = command("-m", "optimizer.lr=1e30,1e31", "norm=none", "name=sweep_lr", *SMALL)
    assert result.returncode == 3
    assert "2 of 2 runs diverged, so there is no report; see log.txt in each folder of runs/sweep_lr" in result.stderr


def test_a_failed_tuning_run_chooses_nothing(command: Command, tmp_path: Path) -> None:
    words = ("ablation=norm_batch_size", "norm=batchnorm", "data.batch_size=32", "seed=0", *SMALL)
    tune = "+ablation.tune={key:optimizer.lr,values:[1e-4,0.1]}"
    bug = "+callbacks.bug={_target_:tests.ablation.faulty.RaisesAbove,lr:0.01}"
    result = command(*words, tune, bug, PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    assert "1 cells × (2 of optimizer.lr × 1 seeds + 0 seeds more), 2 runs, in" in result.stdout
    assert "error: 1 of 2 tuning runs failed" in result.stderr
    assert "RuntimeError: a bug at large rates" in result.stderr
    folder = tmp_path / "runs" / "norm_batch_size"
    assert sorted(record["status"] for record in records(folder).values()) == ["failed", "finished"]
    result = command(str(folder), script="scripts/report.py")
    assert result.returncode == 2
    assert "its tuning is not complete (1 finished, 1 failed)" in result.stderr


def test_each_cell_is_run_at_the_rate_that_was_best_for_it(command: Command, tmp_path: Path) -> None:
    tune = "+ablation.tune={key:optimizer.lr,values:[1e-4,0.1]}"
    result = command("ablation=norm_batch_size", "norm=batchnorm", "data.batch_size=32", "seed=0,1", tune, *SMALL)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs" / "norm_batch_size"
    asked = json.loads((folder / "ablation.json").read_text())
    scores: dict[float, float] = {}
    for run in asked["tuning"]["runs"]:
        metrics = json.loads((folder / run["folder"] / "run.json").read_text())["metrics"]
        scores[run["value"]] = scores.get(run["value"], 0.0) + metrics["val/accuracy"]
    [chosen] = asked["tuning"]["chosen"]
    assert chosen["value"] == max(scores, key=lambda value: scores[value])
    assert {run["folder"] for run in asked["runs"]} <= {run["folder"] for run in asked["tuning"]["runs"]}
    assert len(records(folder)) == 4


def test_long_levels_have_tags_that_wandb_takes_and_that_differ() -> None:
    from ablab.lab.ablation.grid import wandb_tag

    one, other = (
        wandb_tag("data.path", f"{folder}/a-folder-whose-name-is-long/another/part/train.parquet") for folder in "ab"
    )
    assert wandb_tag("norm", "none") == "norm=none"
    assert one != other
    assert len(one) == len(other) == 64


def test_runs_of_an_ablation_are_a_group_with_their_levels_as_tags(command: Command, tmp_path: Path) -> None:
    import yaml

    words = [word for word in SMALL if word != "logger=csv"]
    result = command("-m", "norm=batchnorm", "data.batch_size=8,32", "seed=0", "name=sizes", *words)
    assert result.returncode == 0, result.stderr
    for file in (tmp_path / "runs").glob("*/*/config.yaml"):
        config = yaml.safe_load(file.read_text())
        assert config["logger"]["wandb"]["group"] == "sizes"
        assert config["cell"] == {"data.batch_size": str(config["data"]["batch_size"])}
        assert config["logger"]["wandb"]["tags"] == [f"data.batch_size={config['data']['batch_size']}"]


def test_another_launcher_of_hydra_does_all_runs_although_one_fails(command: Command, tmp_path: Path) -> None:
    fault = "+callbacks.fault={_target_:tests.ablation.faulty.RaisesWith,batch_norm:true,rank:0}"
    words = ("-m", "hydra/launcher=basic", "name=sweep", "norm=batchnorm,groupnorm", *SMALL)
    done = command(*words, fault, PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert "error: 1 of 2 runs failed" in done.stderr
    assert {run["status"] for run in records(tmp_path / "runs" / "sweep").values()} == {"finished", "failed"}


def test_a_launcher_whose_package_is_missing_says_which(command: Command, tmp_path: Path) -> None:
    done = command("-m", "hydra/launcher=ray", "norm=batchnorm,groupnorm", *SMALL)
    assert done.returncode == 2
    assert done.stderr.rstrip().endswith("pip install hydra-ray-launcher")
    assert not (tmp_path / "runs").exists()
    shown = command("hydra/launcher=ray", "--cfg", "hydra", "-p", "hydra.launcher")
    assert "num_gpus: 1" in shown.stdout


def test_runs_of_other_data_are_not_taken_for_these(command: Command, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("to be or not to be, that is the question. " * 200)
    (tmp_path / "copy.txt").write_text((tmp_path / "corpus.txt").read_text())
    (tmp_path / "other.txt").write_text("it was the best of times, it was the worst of times. " * 200)
    words = ("-m", "model=transformer", "data=text", "data.context_length=16", "trainer=smoke", "logger=csv")
    words += ("norm=layernorm,rmsnorm", "name=sweep_norm")
    first = command(*words, "data.path=corpus.txt")
    assert first.returncode == 0, first.stderr
    again = command(*words, "data.path=copy.txt")
    assert again.returncode == 0, again.stderr
    assert ": finished (" not in again.stdout
    result = command(*words, "data.path=other.txt")
    assert result.returncode == 2
    fingerprint = next(iter(records(tmp_path / "runs" / "sweep_norm").values()))["data"]["fingerprint"]
    assert f"began with other data (fingerprint {fingerprint[:12]}) than these (" in result.stderr
    assert "data: runs/sweep_norm/norm=layernorm" in result.stderr
    assert "give the files of then, or the ablation another name, name=…" in result.stderr
    named = command(*words, "data.path=other.txt", "name=dickens")
    assert named.stdout.count(": finished (") == 2, named.stderr


def test_runs_that_no_process_is_left_for_are_named(command: Command) -> None:
    words = ("-m", "+callbacks.bug._target_=tests.ablation.faulty.Kills", "norm=none", "seed=0,1,2", "name=killed")
    result = command(*words, "hydra.launcher.num_processes=2", *SMALL, PYTHONPATH=str(ROOT))
    assert result.returncode == 1
    assert "error: 3 of 3 runs failed" in result.stderr
    assert "  seed=2: not begun" in result.stderr


@pytest.mark.parametrize("num_processes", ["0", "-1", "abc"])
def test_no_number_of_processes_is_refused(num_processes: str) -> None:
    with pytest.raises(ConfigError, match=rf"hydra.launcher.num_processes={num_processes}: give a whole number from 1"):
        local.worker_devices(num_processes)


def test_each_process_has_a_gpu_of_those_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.worker_devices("gpus") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8932f937")
    assert local.worker_devices("gpus") == ["5", "GPU-8932f937"]
    assert local.worker_devices(3) == ["5", "GPU-8932f937", "5"], "more processes than GPUs share them"
    assert local.worker_devices(1) == [None], "one sees all"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert local.worker_devices("gpus") == [None]
    assert local.worker_devices(3) == [None] * 3


def test_a_run_beside_others_has_workers_for_its_data(command: Command, undisturbed: Path, tmp_path: Path) -> None:
    words = (GRID[0], "norm=batchnorm,groupnorm", "data.batch_size=32", "seed=1", *SMALL, "data.num_workers=1")
    result = command(*words, "hydra.launcher.num_processes=2")
    assert result.returncode == 0, result.stderr
    done = outcomes(tmp_path / "runs" / "norm_batch_size")
    assert list(done.values()) == [outcome for name, outcome in outcomes(undisturbed).items() if name in done]


def test_a_sweep_needs_no_weights_and_biases(command: Command, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError('wandb is not installed')")
    result = command("-m", "seed=0,1", "hydra.launcher.num_processes=2", *SMALL, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.thorough
def test_ctrl_c_on_several_processes_leaves_runs_that_can_be_gone_on_with(
    command: Command, undisturbed: Path, tmp_path: Path
) -> None:
    words = (*GRID, "hydra.launcher.num_processes=2")
    launch, folder = start(tmp_path, *words), tmp_path / "runs" / "norm_batch_size"
    wait_for_a_run(launch, folder)
    os.killpg(launch.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    printed, _ = launch.communicate(timeout=LIMIT)
    assert launch.returncode == 75, printed
    assert "running" not in {record["status"] for record in records(folder).values()}
    result = command(*words)
    assert result.returncode == 0, result.stderr
    assert outcomes(folder) == outcomes(undisturbed)


def test_a_job_of_slurm_is_one_run_of_an_ablation_with_a_file(undisturbed: Path, tmp_path: Path) -> None:
    words = [
        "ablation=norm_batch_size",
        *SMALL,
        "norm=groupnorm",
        "data.batch_size=8",
        "seed=1",
        f"folder={tmp_path}/run",
    ]
    run: Any = SimpleNamespace(overrides=[*words, "optimizer.lr=0.025"])
    subprocess.run(slurm.run_command(run, slurm.Site(), {}), shell=True, cwd=tmp_path, check=True, timeout=LIMIT)
    [record] = records(tmp_path).values()
    name = next(name for name in records(undisturbed) if name.startswith("norm=groupnorm,batch_size=8,seed=1"))
    assert record["metrics"] == records(undisturbed)[name]["metrics"]


def test_earlier_runs_are_looked_up_once(undisturbed: Path) -> None:
    ablation: Any = SimpleNamespace(name=undisturbed.name)
    grid = Grid(ablation, [], lambda words: OmegaConf.create(), undisturbed.parent)
    assert len(grid.records) == 4
    assert grid.records is grid.records
