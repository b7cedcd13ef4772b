"""Augmentation: each operation against its definition, and random numbers that belong to the sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from scipy import stats
from torch import Tensor

from ablab.data.augment import Augment, reflect
from ablab.data.batch import Batch
from ablab.data.digits import Digits
from ablab.data.japanese_vowels import JapaneseVowels
from ablab.data.rng import epoch_seeds, index_seeds, normal, sample_seeds, splitmix64, uniform
from ablab.data.shifts import Contrast, Gain, GaussianNoise

RANGE = (0.0, 255.0)


def seeds(num: int, epoch: int = 0, seed: int = 0) -> Tensor:
    own = index_seeds(seed, torch.arange(num))
    return torch.stack([own, torch.full_like(own, epoch)], dim=1)


def images(num: int, size: int = 8, channels: int = 3) -> Tensor:
    """Every pixel of every image another number, as far as bytes go."""
    shape = (num, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def augmented(augment: Augment, inputs: Tensor, epoch: int = 0, targets: Tensor | None = None) -> Batch:
    targets = torch.arange(len(inputs)) % 10 if targets is None else targets
    batch = augment.augment_raw(Batch(inputs, targets, seeds=seeds(len(inputs), epoch)), RANGE)
    return augment.augment_standardized(batch._replace(inputs=batch.inputs.float()), 10)


# Random numbers ----------------------------------------------------------------------------------------------------


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for seed 1234567, as published with the algorithm's C code."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(int(splitmix64(torch.tensor(state))) % 2**64)
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        state -= 2**64 if state >= 2**63 else 0
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    num = 20_000
    streams = [uniform(sample_seeds(0, 0, torch.arange(num)), stream) for stream in range(3)]
    streams += [uniform(sample_seeds(0, 1, torch.arange(num)), 0), uniform(sample_seeds(1, 0, torch.arange(num)), 0)]
    for draws in streams:
        assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
        assert draws.min() >= 0
        assert draws.max() < 1
    correlations = np.corrcoef(torch.stack(streams).numpy()) - np.eye(len(streams))
    assert np.abs(correlations).max() < 4 / num**0.5
    neighbours = np.corrcoef(streams[0][:-1].numpy(), streams[0][1:].numpy())[0, 1]
    assert abs(neighbours) < 4 / num**0.5


def test_normal_draws_are_normal() -> None:
    draws = normal(sample_seeds(0, 0, torch.arange(100)), 0, (20, 10))
    assert draws.shape == (100, 20, 10)
    assert stats.kstest(draws.flatten().numpy(), "norm").pvalue > 1e-3


def test_a_samples_draws_do_not_depend_on_its_batch() -> None:
    augment = Augment(crop_padding=2, flip="random", color_jitter=0.4, cutout=3)
    inputs = images(12)
    whole = augmented(augment, inputs).inputs
    for part in ([3, 7], [7], list(range(11, -1, -1))):
        batch = Batch(inputs[part], torch.zeros(len(part)).long(), seeds=seeds(12)[part])
        before = augment.augment_raw(batch, RANGE)
        after = augment.augment_standardized(before._replace(inputs=before.inputs.float()), 10)
        assert torch.equal(after.inputs, whole[part])


# Crop and flip -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reflect", "zeros"])
def test_a_crop_is_a_window_of_the_padded_image(mode: Any) -> None:
    inputs = images(200, size=6)
    cropped = augmented(Augment(crop_padding=2, crop_mode=mode), inputs).inputs
    padded = F.pad(inputs.float(), (2,) * 4, mode="reflect" if mode == "reflect" else "constant")
    windows = padded.unfold(2, 6, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5)  # (N, rows, columns, C, H, W)
    same = (windows == cropped[:, None, None]).flatten(3).all(-1)
    assert same.flatten(1).sum(1).tolist() == [1] * 200
    counts = same.sum(0).float()  # each of the 25 windows about as often
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3


def test_reflection_is_that_of_numpy() -> None:
    positions = torch.arange(-3, 9)
    assert reflect(positions, 6).tolist() == np.pad(np.arange(6), 3, mode="reflect").tolist()


def test_half_of_the_images_are_flipped_and_others_in_another_epoch() -> None:
    inputs = images(400)
    flipped = [
        (augmented(Augment(flip="random"), inputs, epoch).inputs == inputs.flip(3)).flatten(1).all(1)
        for epoch in range(2)
    ]
    assert all(150 < int(once.sum()) < 250 for once in flipped)
    assert 150 < int((flipped[0] != flipped[1]).sum()) < 250


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs() -> None:
    inputs = images(400)
    flipped = [
        (augmented(Augment(flip="alternating"), inputs, epoch).inputs == inputs.flip(3)).flatten(1).all(1)
        for epoch in range(4)
    ]
    assert 150 < int(flipped[0].sum()) < 250
    assert all(torch.equal(flipped[epoch], ~flipped[epoch + 1]) for epoch in range(3))


# Values ------------------------------------------------------------------------------------------------------------


def test_cutout_sets_a_square_to_the_mean() -> None:
    inputs = images(300, size=12) + 1
    cut = augmented(Augment(cutout=4), inputs).inputs
    holes = (cut == 0).all(1)
    assert torch.equal(torch.where(holes[:, None], inputs.float(), cut), inputs.float())
    sizes = {(int(hole.any(1).sum()), int(hole.any(0).sum()), int(hole.sum())) for hole in holes}
    assert max(sizes) == (4, 4, 16)
    assert all(rows * columns == total and 2 <= rows <= 4 for rows, columns, total in sizes)  # cut off at the border


def test_color_jitter_is_that_of_pillow() -> None:
    inputs = images(20, size=16)
    augment = Augment(color_jitter=0.5)
    found = augment.augment_raw(Batch(inputs, torch.zeros(20).long(), seeds=seeds(20)), RANGE).inputs
    now = epoch_seeds(*seeds(20).unbind(1))
    factors = torch.stack([1 + 0.5 * (2 * uniform(now, stream) - 1) for stream in (3, 4, 5)])
    assert factors.min() < 0.7
    assert factors.max() > 1.3
    for i in range(20):
        image = Image.fromarray(inputs[i].permute(1, 2, 0).numpy())
        steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhance, factor in zip(steps, factors[:, i], strict=True):
            image = enhance(image).enhance(float(factor))
        difference = found[i] - torch.tensor(np.asarray(image)).permute(2, 0, 1)
        assert difference.abs().max() <= 4  # Pillow rounds after each step
        assert difference.abs().mean() < 2


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_blends_images_and_labels_in_the_same_shares(alpha: float) -> None:
    inputs = images(2000, size=2)
    batch = augmented(Augment(mixup=alpha), inputs)
    assert batch.mixed is not None
    torch.testing.assert_close(batch.mixed.sum(1), torch.ones(2000))
    partner = inputs.float().roll(1000, 0)
    targets = torch.arange(2000) // 1000  # partners have different ones, so that the shares can be read
    batch = augmented(Augment(mixup=alpha), inputs, targets=targets)
    assert batch.mixed is not None
    share = batch.mixed.gather(1, targets[:, None]).flatten()
    torch.testing.assert_close(
        batch.inputs, partner.lerp(inputs.float(), share[:, None, None, None]), rtol=0, atol=1e-2
    )
    assert share.min() >= 0.5 - 1e-6  # the larger share is the sample's own
    folded = lambda x: 2 * stats.beta.cdf(x, alpha, alpha) - 1  # noqa: E731
    assert stats.kstest(share.numpy(), folded).pvalue > 1e-3


def test_cutmix_replaces_a_rectangle_whose_share_is_the_labels() -> None:
    inputs = images(1000, size=16).clamp(max=254)
    targets = torch.arange(1000) // 500
    batch = augmented(Augment(cutmix=1.0), inputs, targets=targets)
    assert batch.mixed is not None
    own, other = inputs.float(), inputs.float().roll(500, 0)
    replaced = (batch.inputs != own).any(1)
    assert torch.equal(batch.inputs, torch.where(replaced[:, None], other, own))
    share = batch.mixed.gather(1, targets[:, None]).flatten()
    # a pixel that both images have alike cannot be seen as replaced; that is one in 16 million
    torch.testing.assert_close(1 - share, replaced.flatten(1).float().mean(1), rtol=0, atol=1e-6)
    heights, widths = replaced.any(2).sum(1), replaced.any(1).sum(1)
    assert torch.equal(heights * widths, replaced.flatten(1).sum(1))
    assert share.min() > 0.4


def test_with_both_each_pair_is_mixed_in_one_of_the_two_ways() -> None:
    inputs = images(1000, size=16)
    batch = augmented(Augment(mixup=1.0, cutmix=1.0), inputs)
    whole_pixels = (batch.inputs == inputs.float()).all(1).flatten(1).float().mean(1) > 0.2
    assert 400 < int(whole_pixels.sum()) < 600


def test_mixed_batches_are_learned_from_by_their_shares(run: Callable[..., Any]) -> None:
    done = run("data.augment.mixup=0.4", "data.augment.cutmix=1", "data/augment=crop_flip", "data.augment.cutout=2")
    assert 2 < done.metrics["test/loss"] < 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_padding": -1}, r"crop_padding=-1: 0 \(off\) or more"),
        ({"color_jitter": 1.5}, "color_jitter=1.5: a share from 0 to 1"),
        ({"mixup": -0.1}, "mixup=-0.1: 0"),
        ({"mixup": float("nan")}, "mixup=nan: 0"),
        ({"flip": "horizontal"}, "flip=horizontal: none, random or alternating"),
        ({"crop_mode": "zero"}, "crop_mode=zero: reflect or zeros"),
        ({"cutout": -2}, "cutout=-2: 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


# In a data set -----------------------------------------------------------------------------------------------------


def test_a_batch_of_one_has_nothing_to_mix_with_and_small_parts_of_a_batch_do() -> None:
    single = Digits(batch_size=1, augment=Augment(mixup=0.2))
    single.setup()
    with pytest.raises(ValueError, match="a process with one sample of a batch has none to mix it with"):
        single.example(1)
    parts = Digits(batch_size=8, micro_batch_size=1, augment=Augment(mixup=0.2))
    parts.setup()
    assert parts.example(1).inputs.shape == (1, 1, 8, 8)


def test_only_training_batches_are_augmented() -> None:
    plain, changed = Digits(batch_size=64), Digits(batch_size=64, augment=Augment(crop_padding=2, flip="random"))
    for data in (plain, changed):
        data.setup()

    def first(data: Digits, loader: str) -> Tensor:
        return data.on_after_batch_transfer(next(iter(getattr(data, loader)())), 0).inputs

    assert not torch.equal(first(plain, "train_dataloader"), first(changed, "train_dataloader"))
    assert torch.equal(first(plain, "val_dataloader"), first(changed, "val_dataloader"))
    assert torch.equal(first(plain, "test_dataloader"), first(changed, "test_dataloader"))


def test_a_shift_moves_the_test_inputs_and_nothing_else() -> None:
    plain, shifted = Digits(), Digits(shift=Contrast(severity=5))
    for data in (plain, shifted):
        data.setup()
    assert plain.splits is not None
    assert shifted.splits is not None
    for part in ("train", "val"):
        a, b = (getattr(data.splits, part) for data in (plain, shifted))
        assert a.digest() == b.digest()
    a, b = (data.splits.test[range(360)] for data in (plain, shifted))
    assert torch.equal(a.targets, b.targets)
    assert a.inputs.dtype == b.inputs.dtype == torch.uint8
    assert (a.inputs != b.inputs).float().mean() > 0.3
    assert int(b.inputs.max()) <= 16
    assert torch.equal(plain.mean, shifted.mean)
    # the fingerprint is of the data as they are: a shifted test is one of the same data
    assert plain.fingerprint == shifted.fingerprint


def test_a_run_says_that_its_parts_are_unusual(run: Callable[..., Any]) -> None:
    unusual = [
        "data/shift=contrast",
        "data.shift.severity=4",
        "data.folds=5",
        "data.fold=2",
        "data.classes_per_batch=2",
    ]
    line = "validated on fold 2 of 5; trained on batches of 2 classes; tested under Contrast, severity 4"
    assert line in run(*unusual).printed


def test_a_shift_of_sequences_leaves_padding_alone() -> None:
    data = JapaneseVowels(shift=GaussianNoise(severity=3))
    data.setup()
    assert data.splits is not None
    batch = data.splits.test[range(370)]
    assert batch.valid is not None
    assert not batch.inputs[~batch.valid].any()


def test_a_shift_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="shift: Gain is for sequences, and Digits gives images; choose another"):
        Digits(shift=Gain(severity=1))
