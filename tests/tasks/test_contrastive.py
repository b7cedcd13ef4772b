"""Contrastive pretraining: the loss and the votes by their formulas, views that belong to samples, exact resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from sklearn.neighbors import KNeighborsClassifier
from tests.results import result
from torch import Tensor, nn

from ablab.data.batch import Batch
from ablab.errors import ConfigError
from ablab.lab.config.build import build
from ablab.lab.config.errors import readable_message
from ablab.lab.evaluate import evaluate
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run.checkpoint_files import BEST, read_weights
from ablab.lab.run.resume import resume_config
from ablab.lab.train import assemble, train
from ablab.tasks.contrastive import CHUNK, VOTE_TEMPERATURE, Contrastive, nt_xent

Start = Callable[..., SimpleNamespace]
# a small encoder, and few steps
SMALL = ("task=contrastive", "model.width=8", "trainer=cpu", "trainer.log_every_n_steps=1")


class Flat(nn.Module):
    """Images as vectors, and a classifier of these."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


class Headless(nn.Module):
    """A classifier whose last layer has another name."""

    def __init__(self, in_channels: int, num_classes: int, *, norm: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(64 * in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def task(**settings: Any) -> Contrastive:
    make = partial(torch.optim.SGD, lr=0.1)
    names = [str(digit) for digit in range(10)]
    return Contrastive(model=Flat(), optimizer=make, scheduler=lambda *_: None, class_names=names, **settings)


def directions(number: int) -> Tensor:
    return nn.functional.normalize(torch.randn(number, 2, 5), dim=-1)


def test_the_loss_is_that_of_the_paper() -> None:
    """Equation 1 of Chen et al. 2020, pair by pair."""
    embeddings, temperature = directions(6), 0.3
    z = embeddings.transpose(0, 1).flatten(0, 1)  # all first views, then all second ones
    total = 0.0
    for i in range(12):
        exponentials = [float((z[i] @ z[k] / temperature).exp()) for k in range(12) if k != i]
        j = (i + 6) % 12
        total -= float(torch.tensor(float((z[i] @ z[j] / temperature).exp()) / sum(exponentials)).log())
    assert float(nt_xent(embeddings, embeddings, temperature)) == pytest.approx(total / 12, rel=1e-5)


def test_the_loss_of_a_part_compares_it_with_all() -> None:
    embeddings = directions(7)
    parts = [nt_xent(embeddings[i : i + 1], embeddings, 0.2, first=i) for i in range(7)]
    torch.testing.assert_close(torch.stack(parts).mean(), nt_xent(embeddings, embeddings, 0.2))


def test_the_loss_of_an_evaluation_does_not_depend_on_batches() -> None:
    embeddings = directions(CHUNK + 9)
    metric = task().metrics("val")["loss"]
    for part in embeddings.split(100):
        metric.update(part)
    torch.testing.assert_close(metric.compute(), nt_xent(embeddings, embeddings, 0.2))


def test_neighbors_vote_as_those_of_scikit_learn() -> None:
    of = task(num_neighbors=7)
    labels, images = torch.randint(0, 10, (300,)), torch.randn(300, 1, 4, 4)
    images += labels[:, None, None, None] / 5
    known, asked = images[:250], images[250:]
    of.train_features = (of.features(Batch(known, labels[:250])), labels[:250])
    theirs = KNeighborsClassifier(
        7, metric="cosine", weights=lambda distance: torch.tensor((1 - distance) / VOTE_TEMPERATURE).exp().numpy()
    )
    theirs.fit(known.flatten(1), labels[:250])
    assert of.predict_knn(Batch(asked, labels[250:])).tolist() == theirs.predict(asked.flatten(1)).tolist()


def test_training_moves_samples_of_a_class_together(run: Start) -> None:
    words = ("task=contrastive", "trainer=cpu")
    untrained = run(*words, "trainer.max_epochs=1", "optimizer.lr=0").metrics
    trained = run(*words, "trainer.max_epochs=5").metrics
    for name in ("val/knn_accuracy", "test/knn_accuracy"):
        assert trained[name] > untrained[name] + 0.05
    assert trained["test/loss"] < untrained["test/loss"] - 0.3


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.thorough), 5])
def test_a_run_resumes_to_the_same_bits(run: Start, stop: Callable[..., Path | None], step: int) -> None:
    words = (*SMALL, "trainer.max_epochs=2", "trainer.limit_train_batches=3")
    folder = stop("training_step", step, *words)
    assert folder is not None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    whole = run(*words).folder
    assert result(folder) == result(whole)


def test_workers_change_nothing(run: Start) -> None:
    words = (*SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=3")
    alone, two = (run(*words, f"data.num_workers={number}").folder for number in (0, 2))
    assert (alone / "metrics.csv").read_text() == (two / "metrics.csv").read_text()


def test_views_belong_to_samples_and_epochs_and_are_the_same_in_each_evaluation(
    config: Callable[..., DictConfig],
) -> None:
    data: Any = assemble(config(*SMALL, "logger=csv")).data
    batches = {}
    for epoch in (0, 1):
        data.train_dataloader()
        loader = data.train_dataloader()
        loader.position = lambda epoch=epoch: (epoch, 0)
        batches[epoch] = data.on_after_batch_transfer(next(iter(loader)), 0)
    views = batches[0].views
    assert views.shape == (32, 2, 1, 8, 8)
    assert not torch.equal(views[:, 0], views[:, 1])
    plain = data.first_samples(len(data.splits.train)).inputs
    assert torch.isin(batches[0].inputs[:, 0, 4, 4], plain[:, 0, 4, 4]).all(), "not augmented"
    assert (plain == batches[0].inputs[0]).flatten(1).all(1).any(), "not augmented"
    whole = data.augment_batch(next(iter(data.train_dataloader())), data.augment)
    assert torch.equal(views[:, 0], whole.inputs), "the first view is the augmentation of a batch without views"
    first, again = (data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0) for _ in range(2))
    assert torch.equal(first.views, again.views)
    assert torch.equal(first.inputs, data.on_after_batch_transfer(data.splits.val[range(32)], 0).inputs)


def test_the_encoder_goes_into_a_classifier(run: Start, config: Callable[..., DictConfig]) -> None:
    done = run(*SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=2")
    weights = read_weights(done.folder / "checkpoints" / BEST)
    encoder = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    cfg = config("model.width=8")
    classifier = build(cfg.model, norm=build(cfg.norm), in_channels=1, num_classes=10)
    missing, unexpected = classifier.load_state_dict(encoder, strict=False)
    assert (missing, unexpected) == (["head.weight", "head.bias"], [])


@pytest.mark.parametrize("norm", ["groupnorm", "weightnorm", "none"])
def test_norms_are_swapped_by_a_word(run: Start, norm: str) -> None:
    metrics = run("task=contrastive", f"norm={norm}", "model.width=8", "data.batch_size=64").metrics
    assert set(metrics) == {"val/knn_accuracy", "test/knn_accuracy", "test/loss"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.micro_batch_size=8",), r"^data\.micro_batch_size=8: the loss compares all samples of a batch"),
        (
            ("data.batch_size=1", "norm=layernorm"),
            r"^data\.batch_size=1: the loss compares each sample with others; choose 2 or more",
        ),
        (("data/augment=none",), r"^data: augment is off, .* choose data/augment=contrastive"),
        (("task.temperature=0",), r"^task\.temperature=0.*: more than 0 is needed"),
        (("task.output_size=0",), r"^task\.output_size=0: at least 1 is needed"),
        (("task.num_neighbors=5000",), r"1149 training samples cannot give task\.num_neighbors=5000"),
        (
            (
                "~model.depth",
                "~model.width",
                "~model.style",
                "~model.zero_init_residual",
                "norm=none",
                f"model._target_={__name__}.Headless",
            ),
            r"^task: Headless has no attribute head, and a torch\.nn\.Linear .* expected",
        ),
        (("monitor.metric=val/accuracy", "monitor.mode=max"), r"val/knn_accuracy"),
    ],
    ids=["micro_batch_size", "batch_size", "augment", "temperature", "output_size", "neighbors", "head", "monitor"],
)
def test_what_cannot_work_is_one_error_before_the_training(
    run: Start, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run("task=contrastive", *words)
    assert not list(tmp_path.glob("runs/*"))


def test_data_without_augmentation_are_one_error(config: Callable[..., DictConfig]) -> None:
    with pytest.raises(HydraException) as raised:
        config("task=contrastive", "model=mlp")
    assert readable_message(raised.value).startswith(
        "task=contrastive: it sets data/augment, which nothing that is chosen has"
    )


@pytest.mark.slow
def test_two_processes_are_one(
    command: Callable[..., Any], run: Start, last_weights: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("task=contrastive", "norm=groupnorm", "norm.num_groups=4", "model.width=8", "trainer.max_epochs=2")
    words += ("trainer.limit_train_batches=3", "trainer.precision=64-true", "logger=csv")
    run("trainer=cpu", *words, f"output_dir={tmp_path}/one")
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    done = command(*two, *words, "output_dir=two")
    assert (done.returncode, done.stderr) == (0, "")
    found = {}
    for name in ("one", "two"):
        [file] = (tmp_path / name).glob("*/run.json")
        found[name] = (json.loads(file.read_text())["metrics"], last_weights(file.parent), read_rows(file.parent))
    for name, value in found["one"][1].items():
        torch.testing.assert_close(found["two"][1][name], value, rtol=1e-9, atol=1e-12, msg=name)
    for name, value in found["one"][0].items():
        assert found["two"][0][name] == pytest.approx(value, rel=1e-6), name
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for _, _, rows in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "why"), [("contrastive", "compares augmented views"), ("gan", "trains each of its networks by a loss")]
)
def test_a_measure_on_the_loss_of_samples_as_they_are_is_refused(run: Start, task: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"callbacks.gradient_noise: it measures on the loss .* {why}"):
        run(f"task={task}", "+callbacks/measure=gradient_noise")


def test_the_training_samples_are_not_scored(run: Start) -> None:
    folder = run("task=contrastive").folder
    with pytest.raises(ConfigError, match="each sample would be its own nearest neighbor"):
        evaluate(folder, split="train")
