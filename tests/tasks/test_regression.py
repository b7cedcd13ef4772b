"""Regression: the losses and metrics by their formulas, in the target's own unit, whatever the batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from tests.results import result
from torch import nn

from ablab.data.batch import Batch
from ablab.errors import ConfigError
from ablab.lab.evaluate import evaluate
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train
from ablab.tasks.regression import Regression

Start = Callable[..., SimpleNamespace]
FULL = ("trainer.limit_test_batches=1.0", "trainer.limit_val_batches=1.0")


def task(**settings: object) -> Regression:
    sizes = {"target_names": ["y"], "target_mean": [100.0], "target_std": [20.0]}
    make = partial(torch.optim.SGD, lr=0.1)
    return Regression(model=nn.Identity(), optimizer=make, scheduler=lambda *_: None, **{**sizes, **settings})


@pytest.mark.parametrize(("loss", "expected"), [("mse", F.mse_loss), ("l1", F.l1_loss), ("huber", F.huber_loss)])
def test_a_loss_is_torchs(loss: str, expected: Callable[..., torch.Tensor]) -> None:
    x, y = torch.randn(8, 1) * 3, torch.randn(8, 1)
    assert torch.equal(task(loss=loss).loss(x, Batch(x, y)), expected(x, y))


def test_a_loss_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"^loss=mae: there are mse, l1, huber$"):
        task(loss="mae")


@pytest.mark.parametrize("number", [1, 2])
def test_metrics_are_scikit_learns_in_the_targets_unit(number: int) -> None:
    names, mean, std = ["a", "b"][:number], [100.0, -3.0][:number], [20.0, 0.5][:number]
    of = task(target_names=names, target_mean=mean, target_std=std)
    predicted, real = torch.randn(30, number), torch.randn(30, number)
    for rows in (slice(0, 7), slice(7, 30)):
        batch = Batch(predicted[rows], real[rows])
        of.update(of.metrics("val"), batch.inputs, of.loss(batch.inputs, batch), batch)
    found = {name: float(value) for name, value in of.compute_metrics("val").items()}
    ours, theirs = ((t * torch.tensor(std) + torch.tensor(mean)).numpy() for t in (predicted, real))
    assert found["val/loss"] == pytest.approx(float(F.mse_loss(predicted, real)), rel=1e-5)
    assert found["val/r2"] == pytest.approx(r2_score(theirs, ours), rel=1e-5)
    for name, formula in (("mae", mean_absolute_error), ("rmse", root_mean_squared_error)):
        each = formula(theirs, ours, multioutput="raw_values")
        assert found[f"val/{name}"] == pytest.approx(np.mean(each), rel=1e-5)
        own = {key: value for key, value in found.items() if key.startswith(f"val/{name}/")}
        one_by_one = {f"val/{name}/{target}": pytest.approx(e) for target, e in zip(names, each, strict=True)}
        assert own == (one_by_one if number > 1 else {})


def test_a_single_sample_has_no_r2() -> None:
    of = task()
    batch = Batch(torch.ones(1, 1), torch.zeros(1, 1))
    of.update(of.metrics("val"), batch.inputs, of.loss(batch.inputs, batch), batch)
    assert {name: float(value) for name, value in of.compute_metrics("val").items()} == {
        "val/loss": 1.0,
        "val/mae": 20.0,
        "val/rmse": 20.0,
    }


def test_a_network_predicts_better_than_the_mean_and_its_best_weights_are_chosen(run: Start) -> None:
    done = run("trainer=cpu", "model=mlp", "data=diabetes", "trainer.max_epochs=8", "seed=1")
    assert done.metrics["test/r2"] > 0.3
    assert 30 < done.metrics["test/rmse"] < 77  # the targets' standard deviation
    assert done.metrics["val/rmse"] < 77
    rows = pd.read_csv(done.folder / "metrics.csv")
    assert done.metrics["val/rmse"] == pytest.approx(rows["val/rmse"].min(), rel=1e-5)
    assert {"train/rmse", "val/loss", "val/mae", "val/r2"} <= set(rows.columns)


def test_metrics_do_not_depend_on_the_batches(run: Start) -> None:
    words = ("model=mlp", "data=diabetes", "norm=layernorm", "optimizer.lr=0.0", *FULL)
    first, second = (run(*words, f"data.batch_size={size}").metrics for size in (8, 77))
    assert first == pytest.approx(second, rel=1e-4)


def test_another_task_than_the_datas_is_refused_with_the_one_that_fits(run: Start) -> None:
    with pytest.raises(ConfigError, match=r"BreastCancer, which gives class_names; .* choose task=classification"):
        run("model=mlp", "task=regression")
    with pytest.raises(ConfigError, match=r"Diabetes, which gives target_mean, .* choose task=regression"):
        run("model=mlp", "data=diabetes", "task=classification")
    with pytest.raises(ConfigError, match=r"ResNet is for images, and Diabetes gives vectors.*model=.*mlp"):
        run("model=resnet", "data=diabetes")


def test_a_table_of_ones_own(run: Start, files: Path) -> None:
    words = ("model=mlp", f"data.train_file={files}/table.csv", *FULL)
    done = run(*words, "data=table", "data.target=[progression,bmi]", "data.target_kind=number")
    assert {"test/rmse", "test/rmse/bmi", "test/mae/progression", "test/r2"} <= set(done.metrics)
    done = run(*words, "data=table_classes", "data.target=sex")
    assert json.loads((done.folder / "run.json").read_text())["metrics"]["test/accuracy"] >= 0
    with pytest.raises(ConfigError, match=r"choose task=classification"):
        run(*words, "data=table", "data.target=sex", "data.target_kind=class")


@pytest.mark.parametrize("data", ["table", "table_labels"])
def test_a_run_resumes_within_an_epoch_to_the_same_bits(
    run: Start, stop: Callable[..., Path | None], data_words: Callable[[str], list[str]], data: str
) -> None:
    words = ("trainer=cpu", "model=mlp", *data_words(data), "model.dropout=0.1", "trainer.max_epochs=2")
    few = ("trainer.limit_train_batches=4", "trainer.log_every_n_steps=1")
    folder = stop("training_step", 6, *words, *few)  # the second of the second epoch
    assert folder is not None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    whole = run(*words, *few).folder
    assert result(folder) == result(whole)


def test_a_run_is_evaluated_again(run: Start) -> None:
    done = run("trainer=cpu", "model=mlp", "data=diabetes", "trainer.max_epochs=1")
    again = evaluate(done.folder)
    assert again["test/rmse"] == pytest.approx(done.metrics["test/rmse"], rel=1e-6)
