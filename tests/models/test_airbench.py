"""The speed run of CIFAR-10: its first convolution whitens, and its steps are those of a loop written by hand."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn

from ablab.models.airbench import RIDGE, Airbench
from ablab.norms import GroupNorm, NoNorm

STEPS = 7
WORDS = [
    *("experiment=cifar10_speedrun", "trainer=cpu", "data=synthetic_images", "data.num_samples=100"),
    *("data.batch_size=20", "data/augment=none", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"),
    *("model.widths=[24,30,40]", "callbacks.lookahead.start_epoch=0", "callbacks.lookahead.every_n_steps=2"),
    *("callbacks.freeze.epoch=1", "trainer.precision=64-true", "trainer.channels_last=false"),
]


def test_the_first_convolution_makes_patches_of_its_data_white() -> None:
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(200, 3, 18, 18), 3, 1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    model = Airbench(3, 10, norm=GroupNorm(num_groups=8))
    model.init_from_data(images)
    responses = model.whiten(images).transpose(0, 1).flatten(1)
    first, negative = responses.chunk(2)
    assert torch.equal(first, -negative)
    covariance = first @ first.T / first.shape[1]
    largest = torch.linalg.eigvalsh(covariance).max()
    torch.testing.assert_close(covariance, torch.diag(covariance.diag()), rtol=0, atol=1e-3)
    assert 1 - 10 * RIDGE < largest <= 1.001
    assert not model.whiten.weight.requires_grad


def test_later_convolutions_begin_by_handing_their_inputs_on() -> None:
    model = Airbench(3, 10, norm=NoNorm(), widths=(24, 30, 40))
    x = torch.randn(2, 24, 8, 8)
    block: Any = model.blocks[0]
    torch.testing.assert_close(block.convs[0](x), x)


def test_the_norms_learn_a_shift_and_no_gain() -> None:
    names = {name for name, p in Airbench(3, 10, norm=GroupNorm(num_groups=8)).named_parameters() if p.requires_grad}
    assert "blocks.0.norms.0.bias" in names
    assert not any(name.endswith("norms.0.weight") for name in names)


def test_the_steps_are_those_of_a_loop_by_hand(
    run: Callable[..., Any], config: Callable[..., DictConfig], last_weights: Callable[..., Any]
) -> None:
    done = run(*WORDS)
    with (done.folder / "metrics.csv").open() as file:
        ours = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]

    from ablab.lab.train import assemble

    parts = assemble(done.cfg)
    model: Any = parts.task.model.double()
    batches = []
    data = parts.data
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.position = lambda epoch=epoch: (epoch, 0)
        batches += [data.on_after_batch_transfer(batch, 0) for batch in loader]
    norms = [p for name, p in model.named_parameters() if "norms" in name and p.requires_grad]
    others = [p for name, p in model.named_parameters() if "norms" not in name and p.requires_grad]
    # as in the paper: the loss is summed, so rates are divided by the batch's samples; its k is 1 + 1 / (1 - momentum)
    size = len(batches[0].targets)
    lr = 11.5 / (1 + 1 / 0.15) / size
    decay = 0.0133 * 0.15
    groups: list[dict[str, Any]] = [
        {"params": norms, "lr": 64 * lr, "weight_decay": decay / (64 * lr)},
        {"params": others, "lr": lr, "weight_decay": decay / lr},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.85, nesterov=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    peak = int(0.23 * STEPS)
    losses, slow = [], None
    model.train()
    for step in range(STEPS):
        if step == 5:  # the second epoch
            model.whiten.bias.requires_grad_(False)
        factor = 0.2 + 0.8 * step / peak if step < peak else 1 - 0.93 * (step - peak) / (STEPS - peak)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        logits = model(batches[step].inputs.double())
        loss = F.cross_entropy(logits, batches[step].targets, label_smoothing=0.2, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / size)
        with torch.no_grad():
            state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
            if (step + 1) % 2 == 0:
                if slow is None:
                    slow = {key: value.clone() for key, value in state.items()}
                else:
                    kept = 0.95**2 * ((step + 1) / STEPS) ** 3
                    for key, value in state.items():
                        slow[key].lerp_(value, 1 - kept)
            if slow is not None and step in (1, 3, 4, 5, 6):  # every second step, and where an epoch ends
                for key, value in state.items():
                    value.copy_(slow[key])
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    weights = last_weights(done.folder)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_views_of_a_mirror_symmetric_classifier_are_one() -> None:
    """Averaging over views leaves the logits of a model that sees the mean colour alone, but for the moved borders."""
    from functools import partial

    from ablab.data.batch import Batch
    from ablab.tasks.classification import Classification

    class Colour(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    def task(views: str) -> Classification:
        made: Any = partial(Classification, test_time_augmentation=views)
        return made(model=Colour(), optimizer=torch.optim.SGD, scheduler=None, class_names=["a", "b", "c"])

    batch = Batch(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    plain = task("none").average_views(batch)
    torch.testing.assert_close(task("mirror").average_views(batch), plain)
    constant = batch._replace(inputs=torch.ones(4, 3, 8, 8))
    torch.testing.assert_close(task("mirror_translate").average_views(constant), task("none").average_views(constant))
    # one bright pixel in a corner leaves the image when it is moved there, and is doubled by its reflection elsewhere
    corner = torch.zeros(1, 3, 8, 8)
    corner[..., 0, 0] = 64
    moved = task("mirror_translate").average_views(batch._replace(inputs=corner))
    mirrored = task("mirror").average_views(batch._replace(inputs=corner))
    assert not torch.equal(moved, mirrored)
