"""The main job, end to end: every YAML takes a step, runs repeat to the bit, and processes share one run."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tests.runs import wandb_file

from ablab.lab.run.checkpoint_files import BEST, read_weights

Start = Callable[..., SimpleNamespace]
Command = Callable[..., Any]


def test_every_norm_takes_a_step(run: Start, norm_choice: str) -> None:
    assert math.isfinite(run(f"norm={norm_choice}").metrics["test/loss"])


def test_every_model_takes_a_step(run: Start, model_choice: str) -> None:
    assert math.isfinite(run(f"model={model_choice}").metrics["test/loss"])


def test_every_data_set_takes_a_step(
    run: Start, config: Callable[..., DictConfig], data_choice: str, data_words: Callable[[str], list[str]]
) -> None:
    from hydra.utils import get_class

    words = data_words(data_choice)
    kind = get_class(config(*words).data._target_).kind
    models = {"images": "resnet", "masks": "unet", "vectors": "mlp"}
    done = run(f"model={models.get(kind, 'transformer')}", *words)
    assert math.isfinite(done.metrics["test/loss"])
    record = json.loads((done.folder / "run.json").read_text())
    assert len(record["data"]["fingerprint"]) == 64


def test_every_optimizer_takes_a_step(run: Start, optimizer_choice: str) -> None:
    assert math.isfinite(run(f"optimizer={optimizer_choice}").metrics["test/loss"])


def test_every_schedule_takes_a_step(run: Start, scheduler_choice: str) -> None:
    done = run(f"scheduler={scheduler_choice}", "trainer.max_steps=3", "trainer.limit_train_batches=3")
    assert math.isfinite(done.metrics["test/loss"])


def test_every_trainer_takes_a_step(run: Start, trainer_choice: str) -> None:
    few = [f"trainer.limit_{part}_batches=1" for part in ("train", "val", "test")]
    done = run(
        f"trainer={trainer_choice}",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.max_epochs=1",
        *few,
    )
    assert math.isfinite(done.metrics["test/loss"])


def test_every_logger_takes_a_step(run: Start, logger_choice: str) -> None:
    done = run(f"logger={logger_choice}")
    assert (done.folder / "metrics.csv").exists()
    chosen = [node._target_ for node in done.cfg.logger.values() if node is not None]
    assert (done.folder / "wandb").exists() == any(target.endswith(".WandB") for target in chosen)


def test_every_callbacks_choice_takes_a_step(run: Start, callbacks_choice: str) -> None:
    assert math.isfinite(run(f"callbacks={callbacks_choice}").metrics["test/loss"])


@pytest.mark.parametrize(
    ("model", "data", "task"),
    [
        ("rnn", "digits_rows", "classification"),
        ("rnn", "text", "language_modeling"),
        ("mlp", "table_labels", "multilabel"),
        ("mlp", "diabetes", "regression"),
        ("unet", "digit_scenes", "segmentation"),
    ],
)
def test_data_choose_their_task(
    config: Callable[..., DictConfig], data_words: Callable[[str], list[str]], model: str, data: str, task: str
) -> None:
    assert config(f"model={model}", *data_words(data)).task._target_.split(".")[2] == task


def test_every_experiment_takes_a_step(run: Start, experiment_choice: str, files: Path) -> None:
    few = [f"trainer.limit_{part}_batches=1" for part in ("val", "test")]
    if experiment_choice.startswith("cifar10"):  # in the files of CIFAR-10, a few hundred images
        few += [f"data.root={files}/images", "data.batch_size=64"]
    stop = ["trainer.max_steps=1", "trainer.val_check_interval=1", "callbacks.samples=null"]
    done = run("trainer=cpu", f"experiment={experiment_choice}", *few, *stop)
    assert math.isfinite(done.metrics["test/loss"])


def test_an_experiment_sets_what_it_says_and_the_command_line_wins(config: Callable[..., DictConfig]) -> None:
    cfg = config("experiment=char_lstm")
    assert (cfg.name, cfg.model.hidden_size, cfg.trainer.max_steps, cfg.monitor.mode) == ("char_lstm", 256, 2000, "min")
    cfg = config("experiment=char_lstm", "name=mine", "norm=none", "model.hidden_size=8")
    assert (cfg.name, cfg.norm._target_, cfg.model.hidden_size) == ("mine", "ablab.norms.NoNorm", 8)


def test_a_norm_on_the_command_line_wins_over_the_models(run: Start) -> None:
    assert "norm: LayerNorm(" in run("model=transformer").printed
    assert "norm: GroupNorm(" in run("model=transformer", "norm=groupnorm").printed
    assert "norm: BatchNorm(" in run("model=resnet").printed


def test_the_command_of_the_first_sentence(command: Command, tmp_path: Path) -> None:
    result = command("norm=groupnorm", "data.batch_size=8", "trainer.max_epochs=1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "nothing but what matters is printed"
    folder = next((tmp_path / "runs").iterdir())
    record = json.loads((folder / "run.json").read_text())
    assert record["metrics"]["test/accuracy"] > 0.7
    for text in (
        "run: runs/",
        "W&B: offline",
        "batch: 8",
        "norm: GroupNorm(",
        "num_groups=8",
        "at 9 places",
        "val/accuracy",
    ):
        assert text in result.stdout


@pytest.mark.slow
def test_the_default_run_learns_the_digits(command: Command, tmp_path: Path) -> None:
    result = command("logger=csv")
    assert result.returncode == 0, result.stderr
    record = json.loads(next((tmp_path / "runs").glob("*/run.json")).read_text())
    assert record["metrics"]["test/accuracy"] >= 0.97


@pytest.mark.parametrize("model", ["transformer", pytest.param("rnn", marks=pytest.mark.thorough)])
def test_language_models_fall_below_the_entropy_of_single_characters(run: Start, tmp_path: Path, model: str) -> None:
    text = "".join(f"{i} and {i} is {2 * i}; " for i in range(3000))
    (tmp_path / "sums.txt").write_text(text)
    counts = Counter(text)
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    done = run(
        "trainer=cpu",
        f"model={model}",
        "data=text",
        f"data.path={tmp_path}/sums.txt",
        "data.context_length=32",
        "trainer.max_epochs=2",
        "callbacks.samples.num_tokens=60",
    )
    assert done.metrics["test/bits_per_character"] < 0.5 * entropy
    assert done.metrics["test/perplexity"] == pytest.approx(math.exp(done.metrics["test/loss"]), rel=1e-4)
    samples = (done.folder / "samples.txt").read_text()
    assert samples.count("--- step") == 2
    assert re.search(r"\d; \d+ ", samples.split("--- step")[-1]), "it has learned how a sum ends and the next begins"


def steps(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["resnet", "transformer", pytest.param("rnn", marks=pytest.mark.thorough)])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(run: Start, model: str) -> None:
    words = ("trainer=cpu", f"model={model}", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    words += ("trainer.limit_train_batches=8", "trainer.limit_test_batches=2")
    first, again, other = run(*words), run(*words), run(*words, "seed=1")
    assert steps(first.folder) == steps(again.folder)
    assert steps(first.folder) != steps(other.folder)
    hashes = [json.loads((r.folder / "run.json").read_text())["weights_sha256"] for r in (first, again, other)]
    assert hashes[0] == hashes[1]
    assert hashes[0] != hashes[2]


def test_sampling_text_changes_nothing_of_the_training(run: Start) -> None:
    words = (
        "model=rnn",
        "data=text",
        "trainer.max_steps=4",
        "trainer.limit_train_batches=2",
        "trainer.max_epochs=2",
    )
    dropout = "model.dropout=0.2"
    with_samples = run(*words, dropout, "callbacks.samples.num_tokens=5")
    without = run(*words, dropout, "callbacks.samples=null")
    assert steps(with_samples.folder) == steps(without.folder)


def test_metrics_count_every_sample_once_whatever_the_batch(run: Start) -> None:
    def losses(size: int) -> list[float]:
        done = run(
            "trainer.limit_val_batches=1.0",
            "trainer.limit_test_batches=1.0",
            "optimizer.lr=0.0",
            "norm=groupnorm",
            f"data.batch_size={size}",
        )
        return [done.metrics["test/loss"], done.metrics["test/accuracy"]]

    assert losses(32) == pytest.approx(losses(77), rel=1e-5)


def test_a_class_without_samples_has_no_accuracy_and_is_named(run: Start) -> None:
    done = run("task.per_class=true", "data.batch_size=8")  # 8 digits of a test: some class is not among them
    logged = {name for name in done.metrics if name.startswith("test/accuracy/")}
    [line] = re.findall(r"^test: no samples of (.+); test/accuracy of these classes is not logged$", done.printed, re.M)
    assert 0 < len(logged) < 10
    assert len(re.findall(r"\w+", line.partition(" and ")[0])) >= 1
    assert all(0 <= done.metrics[name] <= 1 for name in logged)


def test_per_class_accuracies_are_logged_where_asked(run: Start) -> None:
    metrics = run("task.per_class=true", "trainer.limit_test_batches=1.0").metrics
    assert {f"test/accuracy/{digit}" for digit in range(10)} <= set(metrics)


def test_a_run_that_ends_before_its_first_validation_tests_its_last_weights(run: Start) -> None:
    done = run("trainer=cpu", "trainer.max_steps=2", "trainer.limit_test_batches=1")
    assert "no validation took place" in done.printed
    assert set(done.metrics) == {"test/loss", "test/accuracy", "test/calibration_error"}


@pytest.mark.slow
def test_two_processes_are_one_run_with_the_metrics_of_one(command: Command, run: Start, tmp_path: Path) -> None:
    words = ("norm=groupnorm", "trainer.max_epochs=1", "trainer.limit_train_batches=12", "trainer.deterministic=true")
    words += ("model.width=8",)
    two = command(*words, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "output_dir=two")
    assert two.returncode == 0, two.stderr
    one = run("trainer=cpu", *words)
    [folder] = [path for path in (tmp_path / "two").iterdir() if path.is_dir()]
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert two.stdout.count("best checkpoint by") == 1
    together = json.loads((folder / "run.json").read_text())
    alone = json.loads((one.folder / "run.json").read_text())
    assert together["status"] == alone["status"] == "finished"
    # the same samples in every step, so the same training up to rounding, and metrics over the same 360 samples
    assert together["metrics"]["test/loss"] == pytest.approx(alone["metrics"]["test/loss"], rel=0.02)
    assert together["metrics"]["test/accuracy"] * 360 == pytest.approx(
        round(together["metrics"]["test/accuracy"] * 360)
    )


@pytest.mark.slow
def test_synchronized_batch_norm_on_two_processes_is_batch_norm_on_one(
    command: Command, run: Start, tmp_path: Path
) -> None:
    steps = ("trainer.max_epochs=1", "trainer.limit_train_batches=6", "logger=csv", "trainer.precision=64-true")
    steps += ("model.width=8", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2")
    processes = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    run("trainer=cpu", "norm=batchnorm", *steps, f"output_dir={tmp_path}/one")
    results = {}
    for name, words in {
        "one": (),
        "synchronized": ("norm=syncbatchnorm", *processes),
        "local": ("norm=batchnorm", *processes),
    }.items():
        if words:
            done = command(*words, *steps, f"output_dir={name}")
            assert done.returncode == 0, done.stderr
        [file] = (tmp_path / name).glob("*/run.json")
        results[name] = (json.loads(file.read_text()), read_weights(file.parent / "checkpoints" / BEST))
    expected = results["one"][1]
    for key, value in results["synchronized"][1].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=key)
    assert not torch.allclose(results["local"][1]["conv1.weight"], expected["conv1.weight"])
    assert results["one"][0]["batch_sizes"] == {"optimizer": 32, "forward": 32, "norm": 32}
    assert results["synchronized"][0]["batch_sizes"] == {"optimizer": 32, "forward": 16, "norm": 32}
    assert results["local"][0]["batch_sizes"] == {"optimizer": 32, "forward": 16, "norm": 16}


@pytest.mark.slow
def test_batch_norm_at_every_time_step_trains_on_two_processes(command: Command) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1")
    done = command("model=rnn", "norm=batchnorm", *two, "trainer.limit_train_batches=3", "logger=csv")
    assert done.returncode == 0, done.stderr


def test_a_run_records_the_batch_that_the_norm_sees_beside_that_of_the_optimizer(run: Start) -> None:
    done = run("norm=ghostbatchnorm", "data.batch_size=256", "data.micro_batch_size=64", "logger=wandb")
    sizes = {"optimizer": 256, "forward": 64, "norm": 16}
    assert json.loads((done.folder / "run.json").read_text())["batch_sizes"] == sizes
    assert "batch: 256 for the optimizer, 64 forward, 16 for the norm" in done.printed
    [file] = done.folder.glob("wandb/offline-run-*/*.wandb")
    assert wandb_file.config(file)["run"]["batch_sizes"] == sizes


@pytest.mark.slow
def test_a_sweep_makes_one_run_a_cell(command: Command, tmp_path: Path) -> None:
    result = command("-m", "norm=batchnorm,groupnorm", "seed=0", "trainer=smoke", "name=sweep_norm")
    assert result.returncode == 0, result.stderr
    folders = [path.parent for path in (tmp_path / "runs" / "sweep_norm").glob("*/run.json")]
    assert len(folders) == 2
    assert all(len(list(folder.glob("wandb/offline-run-*"))) == 1 for folder in folders)
    configs = {(folder / "config.yaml").read_text() for folder in folders}
    assert len(configs) == 2
