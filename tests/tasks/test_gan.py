"""A GAN: the distance by its formula, both networks with the configured norm and optimizer, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tests.results import result
from torch import nn

from ablab.data.rng import seed_step
from ablab.errors import ConfigError
from ablab.lab.evaluate import evaluate
from ablab.lab.loggers.csv_file import read_rows
from ablab.lab.run.checkpoint_files import list_checkpoints, read
from ablab.lab.run.restorable import Unfit, check_checkpoint
from ablab.lab.run.resume import resume_config
from ablab.lab.train import assemble, train
from ablab.norms import BatchNorm, norm_layers
from ablab.tasks.gan import BANDWIDTHS, CHUNK, Generator, MaximumMeanDiscrepancy, mmd

Start = Callable[..., SimpleNamespace]
SMALL = ("task=gan", "model.width=8", "task.width=8", "trainer=cpu", "trainer.log_every_n_steps=1")


def test_the_distance_is_the_unbiased_estimate_of_the_paper() -> None:
    """Gretton et al. 2012, lemma 6, pair by pair."""
    x, y = torch.randn(6, 4), torch.randn(6, 4) + 1

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        distance = float((a - b).square().mean())
        return float(sum(torch.tensor(-distance / (2 * s * s)).exp() for s in BANDWIDTHS)) / len(BANDWIDTHS)

    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    between = sum(kernel(x[i], y[j]) for i in range(6) for j in range(6)) / 36
    assert float(mmd(x, y)) == pytest.approx(within - 2 * between, rel=1e-5)


def test_the_distance_of_equal_distributions_is_near_zero_and_does_not_depend_on_batches() -> None:
    x, y = torch.randn(2, CHUNK + 200, 8)
    metric = MaximumMeanDiscrepancy()
    for real, fake in zip(x.split(300), y.split(300), strict=True):
        metric.update(real, fake)
    assert abs(float(metric.compute())) < 2e-3
    torch.testing.assert_close(metric.compute(), mmd(x, y))
    assert float(mmd(x, y + 0.5)) > 0.02


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 12, 20), (1, 7, 9)])
def test_a_generator_makes_images_of_the_datas_shape(shape: tuple[int, ...]) -> None:
    generator = Generator(shape, norm=BatchNorm(), noise_size=5, width=4)
    assert generator(torch.randn(3, 5)).shape == (3, *shape)


def test_generated_images_approach_the_real_ones(run: Start) -> None:
    done = run("task=gan", "trainer=cpu", "trainer.max_epochs=3", "optimizer.lr=1e-3")
    rows = read_rows(done.folder)
    distances = [row["val/mmd"] for row in rows if "val/mmd" in row]
    assert distances[-1] < 0.5 * distances[0]
    assert done.metrics["test/mmd"] == pytest.approx(done.metrics["val/mmd"], abs=0.05)
    assert {"train/discriminator_loss", "train/generator_loss"} <= {name for row in rows for name in row}
    assert not any("train/loss" in row for row in rows)
    with Image.open(done.folder / "pictures.png") as picture:
        assert picture.size == (72, 72)  # 8 rows and columns of 8 pixels, and a line behind each
    assert evaluate(done.folder) == pytest.approx({"test/mmd": done.metrics["test/mmd"]})


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.thorough), 5])
def test_a_run_resumes_to_the_same_bits(run: Start, stop: Callable[..., Path | None], step: int) -> None:
    words = (*SMALL, "scheduler=cosine", "trainer.max_epochs=2", "trainer.limit_train_batches=3")
    folder = stop("seed_current_step", step + step // 4, *words)  # the validation in between is one more
    assert folder is not None
    train(resume_config(OmegaConf.create({"resume": str(folder)})))
    whole = run(*words).folder
    assert result(folder) == result(whole)


def test_workers_change_nothing(run: Start) -> None:
    words = (*SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=3")
    alone, two = (run(*words, f"data.num_workers={number}").folder for number in (0, 2))
    assert (alone / "metrics.csv").read_text() == (two / "metrics.csv").read_text()


def test_a_batch_is_one_step_of_both_networks_and_their_schedules(run: Start) -> None:
    done = run(*SMALL, "scheduler=cosine", "scheduler.warmup_steps=0", "trainer.max_steps=4")
    [*_, last] = list_checkpoints(done.folder / "checkpoints")
    state: Any = read(last)
    assert state["global_step"] == 4
    for optimizer, schedule in zip(state["optimizer_states"], state["lr_schedulers"], strict=True):
        assert {float(values["step"]) for values in optimizer["state"].values()} == {4.0}
        assert schedule["last_epoch"] == 4
        assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.0, abs=1e-12)
        assert optimizer["param_groups"][0]["betas"] == (0.5, 0.999)


def test_a_schedule_of_epochs_steps_once_an_epoch(run: Start) -> None:
    few = ("trainer.max_epochs=2", "trainer.limit_train_batches=2")
    rows = read_rows(run(*SMALL, "scheduler=per_epoch", *few).folder)
    rates = [row["train/lr"] for row in rows if "train/lr" in row]
    assert rates == pytest.approx([2e-4, 2e-4, 1.8e-4, 1.8e-4])


def test_the_step_is_that_of_the_paper(run: Start, config: Callable[..., DictConfig]) -> None:
    """One step of each network, by hand: sums of cross entropies, and the generator's with swapped labels."""
    words = (*SMALL, "norm=none", "optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false")
    words = (*words, "optimizer.weight_decay=0", "trainer.max_steps=1", "logger=csv")
    task: Any = assemble(config(*words)).task
    data: Any = assemble(config(*words)).data
    generator, discriminator = task.model.generator, task.model.discriminator

    real = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0).inputs
    seed_step(0, 0, 0)
    fake = generator(torch.randn(len(real), 64))
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    entropy = F.binary_cross_entropy_with_logits
    loss = entropy(discriminator(real), ones) + entropy(discriminator(fake.detach()), zeros)
    gradients = torch.autograd.grad(loss, list(discriminator.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(discriminator.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
    deceived = entropy(discriminator(fake), ones)
    gradients = torch.autograd.grad(deceived, list(generator.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(generator.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
    done = run(*words)
    state: Any = read(list_checkpoints(done.folder / "checkpoints")[-1])
    for name, value in task.state_dict().items():
        torch.testing.assert_close(state["state_dict"][name], value, msg=name)
    [row] = [row for row in read_rows(done.folder) if "train/generator_loss" in row]
    assert row["train/discriminator_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["train/generator_loss"] == pytest.approx(deceived.item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["groupnorm", "instancenorm", "spectralnorm"])
def test_norms_are_swapped_by_a_word_in_both_networks(run: Start, config: Callable[..., DictConfig], norm: str) -> None:
    assert set(run("task=gan", f"norm={norm}").metrics) == {"val/mmd", "test/mmd"}
    model = assemble(config("task=gan", f"norm={norm}", "trainer=smoke", "logger=csv")).task.model
    assert isinstance(model, nn.Module)
    found = {name.partition(".")[0] for name in norm_layers(model)}
    assert found == {"generator", "discriminator"}


def test_any_image_model_is_a_discriminator(run: Start) -> None:
    assert set(run("task=gan", "model=resnet", "model.width=8").metrics) == {"val/mmd", "test/mmd"}


def test_a_norm_that_the_generator_cannot_have_is_named_with_its_place(run: Start) -> None:
    with pytest.raises(
        ConfigError, match=r"at generator\.layers\.6 of the model\)\nnorm: defined everywhere.*batchnorm"
    ):
        run("task=gan", "norm=groupnorm", "norm.num_groups=16", "task.width=4")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.micro_batch_size=8",), r"^data\.micro_batch_size=8: a step of a GAN takes its batch whole"),
        (("trainer.gradient_clip_val=1.0",), r"^trainer\.gradient_clip_val=1\.0: GAN steps its optimizers by itself"),
        (("trainer.accumulate_grad_batches=2",), r"^trainer\.accumulate_grad_batches=2: GAN steps .*batches=1$"),
        (("task.noise_size=0",), r"^task\.noise_size=0: at least 1 is needed"),
        (("scheduler=plateau",), r"^scheduler: it waits for val/mmd, and GAN steps its schedules by itself"),
        (("model=mlp", "data=breast_cancer"), r"^task: GAN does not go with BreastCancer, .* task=classification"),
        (("model=transformer",), r"^model: Transformer is for sequences or text, and Digits gives images"),
    ],
    ids=["micro_batch_size", "clipping", "accumulation", "noise_size", "plateau", "data", "model"],
)
def test_what_cannot_work_is_one_error_before_the_training(
    run: Start, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run("task=gan", "data=digits", *words) if "data=breast_cancer" not in words else run("task=gan", *words)
    assert not list(tmp_path.glob("runs/*"))


def test_a_state_that_lacks_an_optimizer_is_refused(run: Start, config: Callable[..., DictConfig]) -> None:
    done = run("task=gan", "model.width=8", "task.width=8")
    parts = assemble(config(*done.words))
    [*_, last] = list_checkpoints(done.folder / "checkpoints")
    state: Any = read(last)
    check: Any = check_checkpoint
    check(last, state, task=parts.task, trainer=parts.trainer, data=parts.data)
    with pytest.raises(Unfit, match=r"it has 1 optimizers and 2 schedules, and 2 each is needed"):
        check(
            last,
            {**state, "optimizer_states": state["optimizer_states"][:1]},
            task=parts.task,
            trainer=parts.trainer,
            data=parts.data,
        )


@pytest.mark.slow
def test_two_processes_share_a_run(command: Callable[..., Any], tmp_path: Path) -> None:
    words = ("task=gan", "model.width=8", "task.width=8", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    short = ("trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1", "logger=csv")
    found = []
    for name in ("first", "again"):
        done = command(*words, *short, f"output_dir={name}")
        assert done.returncode == 0, done.stderr
        [folder] = (tmp_path / name).iterdir()
        found.append((folder / "metrics.csv").read_text())
        steps = [row["step"] for row in read_rows(folder) if "train/generator_loss" in row]
        assert steps == list(range(6))
    assert found[0] == found[1]
