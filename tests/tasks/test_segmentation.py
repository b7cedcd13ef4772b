"""Segmentation: the loss and the metrics over counted pixels, whatever the batches, their parts and the processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from tests.results import result
from torch import Tensor, nn

from ablab.data.batch import Batch
from ablab.data.digits import load_digits
from ablab.errors import ConfigError
from ablab.lab.config.build import build
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train
from ablab.tasks.language_modeling import LanguageModeling
from ablab.tasks.segmentation import PixelIoU, Segmentation
from ablab.tasks.task import Task

Start = Callable[..., SimpleNamespace]
SMALL = ("model.depth=1", "model.width=8")


def task(model: nn.Module | None = None, number: int = 3, **settings: Any) -> Segmentation:
    make = partial(torch.optim.SGD, lr=0.1)
    names = [f"class {i}" for i in range(number)]
    model = nn.Identity() if model is None else model
    return Segmentation(model=model, optimizer=make, scheduler=lambda *_: None, pixel_classes=names, **settings)


def masks(num: int, number: int = 3, size: int = 6) -> Tensor:
    """Random classes; the first mask has few pixels that count, the last has many."""
    targets = torch.randint(0, number, (num, size, size))
    ignored = torch.rand(num, size, size) < torch.linspace(0.95, 0.05, num)[:, None, None]
    return targets.masked_fill(ignored, 255)


def compute_metrics(of: Segmentation, logits: Tensor, targets: Tensor) -> dict[str, float]:
    for rows in (slice(0, 2), slice(2, None)):
        batch = Batch(logits[rows], targets[rows])
        of.update(of.metrics("val"), batch.inputs, of.loss(batch.inputs, batch), batch)
    return {name: float(value) for name, value in of.compute_metrics("val").items()}


# Loss and metrics --------------------------------------------------------------------------------------------------


def test_the_loss_is_torchs_mean_over_counted_pixels() -> None:
    logits, targets = torch.randn(5, 3, 6, 6), masks(5)
    expected = F.cross_entropy(logits, targets, ignore_index=255)
    torch.testing.assert_close(task().loss(logits, Batch(logits, targets)), expected)


def test_a_batch_without_a_counted_pixel_has_no_loss_and_no_gradient() -> None:
    logits, targets = torch.randn(2, 3, 6, 6, requires_grad=True), torch.full((2, 6, 6), 255)
    loss = task().loss(logits, Batch(logits, targets))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert compute_metrics(task(), logits.detach(), targets) == {}


def test_metrics_are_scikit_learns_over_all_counted_pixels() -> None:
    logits, targets = torch.randn(7, 3, 6, 6), masks(7)
    found = compute_metrics(task(per_class=True), logits, targets)
    real, predicted = (t[targets != 255].numpy() for t in (targets, logits.argmax(1)))
    each = jaccard_score(real, predicted, average=None)
    assert found == {
        "val/loss": pytest.approx(float(F.cross_entropy(logits, targets, ignore_index=255)), rel=1e-5),
        "val/accuracy": pytest.approx(accuracy_score(real, predicted)),
        "val/mean_iou": pytest.approx(np.mean(each)),
        **{f"val/iou/class {i}": pytest.approx(value) for i, value in enumerate(each)},
    }
    assert set(compute_metrics(task(), logits, targets)) == {"val/loss", "val/accuracy", "val/mean_iou"}


def test_a_class_that_does_not_occur_is_left_out_and_one_that_is_only_predicted_counts_as_zero() -> None:
    targets = torch.zeros(4, 2, 2, dtype=torch.int64)
    logits = F.one_hot(targets, 3).movedim(-1, 1).float()
    assert compute_metrics(task(per_class=True), logits, targets)["val/mean_iou"] == 1
    logits[0, :, 0, 0] = torch.tensor([0.0, 1.0, 0.0])
    found = compute_metrics(task(per_class=True), logits, targets)
    assert found["val/mean_iou"] == pytest.approx((15 / 16 + 0) / 2)
    assert {name for name in found if "iou/" in name} == {"val/iou/class 0", "val/iou/class 1"}


def test_deterministic_operations_take_no_more_memory() -> None:
    """torchmetrics' own count would take 30 GB here."""
    torch.use_deterministic_algorithms(True)
    metric = PixelIoU(64, validate_args=False)
    targets = torch.arange(64).repeat(1, 1024, 16)
    metric.update(targets, targets)
    assert metric.compute().tolist() == [1.0] * 64


# Parts of a batch --------------------------------------------------------------------------------------------------


def language_model(model: nn.Module) -> LanguageModeling:
    return LanguageModeling(model=model, optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=lambda *_: None)


def gradient(of: Task, parts: list[Batch], batch: Batch) -> tuple[float, Tensor]:
    of.zero_grad()
    losses = [of.micro_batch_loss(part, batch) for part in parts]
    sum(losses).backward()  # type: ignore[union-attr]
    return sum(loss.item() for loss in losses), torch.cat([p.grad.flatten() for p in of.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["masks", "text"])
@pytest.mark.parametrize("largest", [1, 2, 5])
def test_parts_with_different_numbers_of_ignored_targets_add_up_to_the_whole_batch(kind: str, largest: int) -> None:
    if kind == "masks":
        batch, of = Batch(torch.randn(7, 1, 6, 6), masks(7)), task(nn.Conv2d(1, 3, 3, padding=1))
    else:
        tokens = torch.randint(0, 9, (7, 12))
        ignored = torch.arange(12) > torch.arange(7)[:, None] + 1
        batch = Batch(tokens, tokens.roll(-1, 1).masked_fill(ignored, -100))
        of = language_model(nn.Embedding(9, 9))  # type: ignore[assignment]
    loss, expected = gradient(of, [batch], batch)
    assert loss == pytest.approx(of.loss(of(batch), batch).item())
    in_parts, found = gradient(of, batch.parts(largest), batch)
    assert in_parts == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# Runs --------------------------------------------------------------------------------------------------------------


def test_a_network_learns_a_batch_by_heart(config: Callable[..., DictConfig], batch: Callable[..., Any]) -> None:
    cfg = config("model=unet", "model.depth=2")
    example, sizes = batch("masks", 4)
    of = task(build(cfg.model, norm=build(cfg.norm), **sizes), sizes["num_classes"])
    optimizer = torch.optim.Adam(of.parameters(), lr=1e-2)
    for _ in range(80):
        loss = of.loss(of(example), example)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert compute_metrics(of, of(example).detach(), example.targets)["val/mean_iou"] > 0.95


def test_the_network_chooses_data_and_task(run: Start, config: Callable[..., DictConfig]) -> None:
    words = ("norm=groupnorm", "data.batch_size=8", "task.per_class=true", "data/shift=contrast")
    done = run("model=unet", *words, *SMALL)
    assert {"test/loss", "test/accuracy", "test/mean_iou", "test/iou/background"} <= set(done.metrics)
    assert "data: DigitScenes, 575 train, 144 val, 180 test; tested under Contrast, severity 3" in done.printed
    assert config("model=unet").monitor == {"metric": "val/mean_iou", "mode": "max"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("task=segmentation",),
            r"Segmentation does not go with Digits, which gives images; .*, choose model=unet",
        ),
        (("data=digit_scenes",), r"ResNet is for images, and DigitScenes gives masks; .*, or model=unet for this data"),
        (("model=unet", "data=digits"), r"UNet is for masks, and Digits gives images; choose data=digit_scenes\|"),
        (
            ("model=unet", "task=classification"),
            r"Classification does not go with DigitScenes, which gives pixel_classes; .* choose task=segmentation$",
        ),
        (
            ("model=unet", "data.augment.mixup=0.2"),
            r"data.augment.mixup=0.2: it mixes .* DigitScenes gives a label for each pixel; set it to 0, and try",
        ),
        (("model=unet", "data.augment.cutmix=1"), r"data.augment.cutmix=1: it mixes"),
        (("model=unet", "+data.classes_per_batch=2"), r"data.classes_per_batch=2: .* leave it at null"),
        (("model=unet", "data/shift=rotation"), r"shift: Rotation is for images, and DigitScenes gives masks"),
    ],
)
def test_what_does_not_go_together_is_refused(run: Start, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Images whose masks have different numbers of ignored pixels: from a few to nearly all."""
    digits = load_digits()[0].numpy() * 15
    for folder in ("images", "masks"):
        (tmp_path / "scenes" / folder).mkdir(parents=True)
    for i, image in enumerate(digits[:64]):
        mask = (image > 60).astype(np.uint8)
        mask[: (i % 8)] = 255
        Image.fromarray(image).save(tmp_path / "scenes" / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "scenes" / "masks" / f"{i}.png")
    return tmp_path / "scenes"


AUGMENTED = ("data/augment=crop_flip", "data.augment.crop_mode=zeros", "data.augment.crop_padding=2")


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_resumes_within_an_epoch_to_the_same_bits(
    run: Start, stop: Callable[..., Path | None], scenes: Path, step: int
) -> None:
    words = ("trainer=cpu", "model=unet", "data=image_masks", f"data.root={scenes}", *SMALL, *AUGMENTED)
    few = ("data.batch_size=8", "data.micro_batch_size=3", "trainer.max_epochs=2", "trainer.limit_train_batches=3")
    folder = stop("training_step", step, *words, *few)
    assert folder is not None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    whole = run(*words, *few).folder
    assert result(folder) == result(whole)


@pytest.mark.slow
def test_two_processes_with_different_numbers_of_counted_pixels_train_as_one(
    command: Callable[..., Any],
    run: Callable[..., Any],
    last_weights: Callable[..., Any],
    scenes: Path,
    tmp_path: Path,
) -> None:
    words = ("model=unet", "data=image_masks", f"data.root={scenes}", "norm=groupnorm", *SMALL, *AUGMENTED)
    few = ("data.batch_size=8", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.precision=64-true")
    logged = ("trainer.log_every_n_steps=1", "logger=csv")
    run("trainer=cpu", *words, *few, *logged, f"folder={tmp_path}/cpu")
    two = ("trainer=ddp_cpu", "data.micro_batch_size=3", "folder=ddp_cpu")
    done = command(*words, *few, *logged, *two, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = {}
    for trainer in ("cpu", "ddp_cpu"):
        record = json.loads((tmp_path / trainer / "run.json").read_text())
        found[trainer] = (last_weights(tmp_path / trainer), record["metrics"])
    (expected, metrics), (weights, others) = found["cpu"], found["ddp_cpu"]
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert others == pytest.approx(metrics, rel=1e-6)
