"""Weights scored again from a run's folder: the same numbers, other splits and shifts, nothing changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ablab.errors import ConfigError
from ablab.lab.config.build import build
from ablab.lab.evaluate import describe_shift, evaluate, scoring_config

Start = Callable[..., SimpleNamespace]
WORDS = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.max_steps=4"]
MODELS = {
    "resnet": ["callbacks=recalibration", "callbacks.recalibration.num_batches=2"],
    "transformer": ["model=transformer", "data=text", "data.context_length=16", "trainer.limit_test_batches=5"],
    "rnn": ["model=rnn", "data=japanese_vowels", "data/shift=gain", "callbacks=ema", "callbacks.ema.decay=0.5"],
}


def files_of(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", list(MODELS))
def test_on_the_runs_own_test_the_numbers_are_the_runs_own(run: Start, name: str) -> None:
    folder = run(*WORDS, *MODELS[name]).folder
    before = files_of(folder)
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    assert evaluate(folder) == {key: value for key, value in metrics.items() if key.startswith("test/")}
    assert files_of(folder) == before


def test_every_split_is_scored_whole_and_any_shift_on_each(run: Start) -> None:
    # it tests on one batch; what that leaves out of its test must not be left out of the other splits
    limit = "trainer.limit_test_batches=1"
    folder = run(*WORDS, limit, "data/shift=contrast", "data.shift.severity=5", "data/augment=crop_flip").folder
    record = json.loads((folder / "run.json").read_text())
    plain = {split: evaluate(folder, split=split, shift="none") for split in ("train", "val", "test")}
    for split, found in plain.items():
        number = min(32, record["data"]["test"]) if split == "test" else record["data"][split]
        hits = found["test/accuracy"] * number
        assert hits == pytest.approx(round(hits), abs=1e-3), "every sample of the split, once"
    assert plain["val"]["test/accuracy"] == pytest.approx(record["metrics"]["val/accuracy"], abs=1e-7)
    assert evaluate(folder)["test/loss"] == record["metrics"]["test/loss"], "shifted, as in the run"
    assert plain["test"]["test/loss"] != record["metrics"]["test/loss"]
    milder = evaluate(folder, severity=1)
    assert milder["test/loss"] != record["metrics"]["test/loss"]
    assert evaluate(folder, split="val", shift="contrast", severity=1) != plain["val"]


def test_the_last_weights_are_those_of_the_newest_checkpoint(run: Start) -> None:
    # nothing is learned, so the first validation stays the best, and the norm's averages move on
    done = run("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=4", "optimizer.lr=0")
    record = json.loads((done.folder / "run.json").read_text())
    assert record["weights_sha256"]["best"] != record["weights_sha256"]["last"], "the test below needs them to differ"
    assert evaluate(done.folder, weights="last") != evaluate(done.folder)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_sample_of_a_split_is_scored_once_and_as_it_is(
    run: Start, monkeypatch: pytest.MonkeyPatch, split: Any
) -> None:
    from ablab.tasks.classification import Classification

    folder = run(*WORDS, "data/augment=crop_flip", "data.augment.mixup=0.3").folder
    seen: list[Any] = []
    step = Classification.test_step

    def watch(self: Classification, batch: Any, *rest: Any) -> Any:
        assert not self.model.training
        seen.append((batch.inputs, batch.targets))
        return step(self, batch, *rest)

    monkeypatch.setattr(Classification, "test_step", watch)
    evaluate(folder, split=split)
    inputs, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    data = build(cfg.data)
    data.setup("fit")
    whole = data.on_after_batch_transfer(getattr(data.splits, split).as_batch(), 0)
    assert torch.equal(inputs, whole.inputs)
    assert torch.equal(targets, whole.targets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": "contras"}, "shift=contras: there is no such choice; did you mean contrast?"),
        ({"shift": "time_warp"}, "data: shift: TimeWarp is for sequences, and Digits gives images"),
        ({"severity": 3}, "severity=3: of which shift"),
        ({"shift": "contrast", "severity": 9}, "severity=9: a whole number from 1 to 5"),
    ],
)
def test_what_cannot_be_scored_is_refused(run: Start, settings: dict[str, Any], message: str) -> None:
    folder = run().folder
    with pytest.raises(ConfigError, match=message):
        evaluate(folder, **settings)


def test_weights_that_are_broken_or_missing_are_named(run: Start, tmp_path: Path) -> None:
    folder = run().folder
    file = folder / "checkpoints" / "best.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"best\.safetensors: it is cut off.* the last weights may do"):
        evaluate(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"best\.safetensors: there is none, the run has not validated"):
        evaluate(folder)
    evaluate(folder, weights="last")
    with pytest.raises(ConfigError, match=r"nowhere: it is not a run's folder; there is no run\.json in it"):
        evaluate(tmp_path / "nowhere")


def test_a_broken_newest_checkpoint_is_passed_over_and_other_models_weights_are_refused(
    run: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("trainer.max_steps=2", "trainer.limit_train_batches=2", "callbacks.checkpoints.every_n_steps=1").folder
    newest = sorted((folder / "checkpoints").glob("*.ckpt"))[-1]
    assert newest.name == "00000002-end.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    before = files_of(folder)
    evaluate(folder, weights="last")
    said = capsys.readouterr()
    assert "00000002-end.ckpt: it is cut off" in said.err
    assert "last weights: " in said.out
    assert files_of(folder) == before
    cfg = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(cfg, "model.depth", 14)
    OmegaConf.save(cfg, folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"best\.safetensors: its weights are not of the model that the code now"):
        evaluate(folder)


def test_a_shift_is_named_as_on_the_command_line(run: Start) -> None:
    folder = run("data/shift=contrast", "data.shift.severity=5").folder
    assert describe_shift(scoring_config(folder)) == "contrast, severity 5"
    assert describe_shift(scoring_config(folder, severity=2)) == "contrast, severity 2"
    assert describe_shift(scoring_config(folder, shift="rotation")) == "rotation, severity 3"
    assert describe_shift(scoring_config(folder, shift="none")) == "none"


def test_other_data_are_refused_and_other_code_is_said(
    run: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    folder = run("model=rnn", "data=text", f"data.path={text}", "data.context_length=8").folder
    record = json.loads((folder / "run.json").read_text())
    other = {**record, "identity": {**record["identity"], "code": "0" * 16}}
    (folder / "run.json").write_text(json.dumps(other))
    evaluate(folder)
    assert f"not as it was: the code: {'0' * 16} (commit " in capsys.readouterr().out
    text.write_text("the quick brown fox jumps over the lazy cat. " * 200)
    with pytest.raises(ConfigError, match="the data are not those of the run"):
        evaluate(folder)


def test_a_shift_of_text_is_refused(run: Start) -> None:
    folder = run("model=rnn", "data=text").folder
    with pytest.raises(ConfigError, match=r"data\.shift: Text takes no such argument"):
        evaluate(folder, shift="contrast")


@pytest.mark.slow
def test_the_script_prints_a_table(run: Start, command: Callable[..., Any]) -> None:
    folder = run().folder
    done = command(str(folder), "--split", "val", "--shift", "brightness", script="scripts/evaluate.py")
    assert done.returncode == 0, done.stderr
    weights, *table = done.stdout[done.stdout.index("best weights") :].splitlines()  # what takes long says so before
    assert weights.endswith("checkpoints/best.safetensors")
    lines = dict(line.split(maxsplit=1) for line in table)
    assert lines["split"] == "val"
    assert lines["shift"] == "brightness, severity 3"
    assert float(lines["accuracy"]) == pytest.approx(
        evaluate(folder, split="val", shift="brightness")["test/accuracy"], abs=1e-4
    )
