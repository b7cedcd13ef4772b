"""Covariate shift: corruptions of test inputs with five severities, which keep the labels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.data.batch import Kind
from ablab.data.rng import normal, sample_seeds, uniform

CHUNK = 1 << 22  # values per chunk, to bound memory

# Each use of random numbers has its own stream.
NOISE, TURN, FACTOR, OFFSET, BEND, DIRECTION = range(6)


class Shift(ABC):
    """Base class of corruptions of test inputs: P(x) changes, P(y | x) does not.

    The severity determines the size of the change, which is the same for all samples. Random numbers depend on (seed,
    sample index) only, so that all severities use the same ones.

    Sizes are relative to a unit, so that they are comparable between data sets. For images, the unit is the range of
    their values, and results are clipped to that range. For sequences, it is four standard deviations of a feature (a
    range that contains 95 % of normally distributed values), over the valid steps of all samples; padding is unchanged.

    Args:
        severity: from 1 to 5.
        seed: seed of the random numbers.

    Raises:
        ValueError: `severity` or `seed` is out of range.
    """

    kinds: ClassVar[tuple[Kind, ...]]  # kinds of data that the shift supports
    moves_pixels: ClassVar[bool] = False  # whether masks would no longer match their images
    sizes: ClassVar[tuple[float, float, float, float, float]]

    def __init__(self, *, severity: int, seed: int = 0) -> None:
        if severity not in range(1, 6):
            raise ValueError(f"severity={severity}: a whole number from 1 to 5 is needed")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}: a whole number from 0 to {2**32 - 1} is needed")
        self.severity = severity
        self.seed = seed

    @property
    def size(self) -> float:
        """Size of the change at this severity."""
        return self.sizes[self.severity - 1]

    @abstractmethod
    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        """Return a chunk of samples with the shift applied.

        Shape:
            images: x `(N, C, H, W)`, scaled to [0, 1], unit `()`
            sequences: x `(N, L, features)`, unit `(features)`, valid `(N, L)`
            seeds `(N)`
        """

    def __call__(self, inputs: Tensor, valid: Tensor | None = None, *, low: float = 0.0, high: float = 255.0) -> Tensor:
        """Apply the shift to all inputs of a data set; integer inputs are rounded and clipped to [low, high].

        Args:
            inputs: images or sequences.
            valid: True for real steps of sequences, which precede padding.
            low, high: range of the values of images, and of integer sequences.

        Shape:
            inputs `(N, C, H, W)` or `(N, L, features)`, valid `(N, L)` -> as inputs
        """
        images = inputs.dim() == 4
        assert ("images" if images else "sequences") in self.kinds
        precise = torch.promote_types(inputs.dtype, torch.float32)
        unit = (inputs.new_ones((), dtype=precise) if images else 4 * feature_stds(inputs, valid)).to(precise)
        seeds = sample_seeds(self.seed, 0, torch.arange(len(inputs), device=inputs.device))
        result = torch.empty_like(inputs)
        for rows in chunks(inputs):
            x, real = inputs[rows].to(precise), None if valid is None else valid[rows]
            if images:
                y = self.apply((x - low) / (high - low), seeds[rows], unit, real).clamp(0, 1) * (high - low) + low
            else:
                y = self.apply(x, seeds[rows], unit, real)
            if not inputs.is_floating_point():
                y = y.round().clamp(low, high)
            result[rows] = y if real is None else torch.where(real[..., None], y, x)
        return result


class GaussianNoise(Shift):
    """Gaussian noise: y = x + c · unit · n with n ~ N(0, 1).

    c is 0.04, 0.06, 0.08, 0.09 or 0.10, the severities of CIFAR-10-C. For sequences, this is 0.16, 0.24, 0.32, 0.36 or
    0.40 standard deviations of the feature, a choice of this project.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261;
        Um et al. 2017 (sequences: jittering), https://arxiv.org/abs/1706.00527
    """

    kinds = ("images", "sequences")
    sizes = (0.04, 0.06, 0.08, 0.09, 0.10)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        return x + self.size * unit * normal(seeds, NOISE, tuple(x.shape[1:]))


class GaussianBlur(Shift):
    """Gaussian blur of each channel with a standard deviation of c pixels.

    c is 0.4, 0.6, 0.7, 0.8 or 1, the severities of CIFAR-10-C. The kernel is truncated at 4 · c, and the border pixels
    are replicated.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.4, 0.6, 0.7, 0.8, 1.0)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        radius = round(4 * self.size)
        distance = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.softmax(-0.5 * (distance / self.size) ** 2, 0)
        planes = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view(x.shape)


class Contrast(Shift):
    """Reduced contrast: y = mean + c · (x − mean), with the mean of each channel of each image.

    c is 0.75, 0.5, 0.4, 0.3 or 0.15, the severities of CIFAR-10-C.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.75, 0.5, 0.4, 0.3, 0.15)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return mean + self.size * (x - mean)


class Brightness(Shift):
    """Increased brightness: adds c to the HSV value v, and keeps hue and saturation.

    y = x · min(v + c, 1) / v, where v is the maximum of x over channels; with a single channel, y = x + c. c is 0.05,
    0.1, 0.15, 0.2 or 0.3, the severities of CIFAR-10-C. For images with few levels, severities may coincide: with 16
    levels, c is 1, 2, 2, 3 or 5 levels.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.05, 0.1, 0.15, 0.2, 0.3)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        value = x.amax(1, keepdim=True)
        brighter = (value + self.size).clamp(max=1)
        return torch.where(value > 0, x * (brighter / value), brighter)  # black has no hue and becomes gray


class Pixelate(Shift):
    """Reduced resolution: averages pixels in ⌊c · H⌋ x ⌊c · W⌋ blocks.

    c is 0.95, 0.9, 0.85, 0.75 or 0.65, the severities of CIFAR-10-C, which were chosen for 32x32 images. For small
    images they are too close: 8 pixels become 7, 7, 6, 6 or 5 blocks, and 5 blocks happen to suit the digits better
    than 6.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.95, 0.9, 0.85, 0.75, 0.65)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        rows, columns = (self.block_mean_matrix(length).to(x) for length in x.shape[2:])
        return rows @ x @ columns.T

    def block_mean_matrix(self, length: int) -> Tensor:
        """Return the matrix `(length, length)` that replaces each pixel of a line by the mean of its block."""
        count = max(1, int(self.size * length))
        block = (2 * torch.arange(length) + 1) * count // (2 * length)  # the block that contains the pixel's center
        same = (block[:, None] == block).double()
        return same / same.sum(1, keepdim=True)


class Rotation(Shift):
    """Rotation around the center by 5, 10, 15, 20 or 30 degrees, in a random direction.

    Pixels are interpolated bilinearly, and pixels from outside the image are black. The severities are a choice of this
    project; 30 degrees is the largest angle of Engstrom et al.

    References:
        Engstrom et al. 2019, https://arxiv.org/abs/1712.02779
    """

    kinds = ("images",)
    moves_pixels = True
    sizes = (5.0, 10.0, 15.0, 20.0, 30.0)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        angle = math.radians(self.size) * random_signs(seeds, TURN).to(x)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # affine_grid normalizes both coordinates to [−1, 1], so rescale for images that are not square
        matrix = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Gain(Shift):
    """Sensor gain error: y = x · c or y = x / c, chosen at random for each sample.

    c is 1.1, 1.2, 1.4, 1.7 or 2, a choice of this project.

    References:
        Um et al. 2017 (scaling), https://arxiv.org/abs/1706.00527
    """

    kinds = ("sequences",)
    sizes = (1.1, 1.2, 1.4, 1.7, 2.0)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        return x * (self.size ** random_signs(seeds, FACTOR))[:, None, None]


class Offset(Shift):
    """Sensor bias: y = x ± c · unit, with a random sign for each sample and feature.

    c is 0.05, 0.1, 0.15, 0.2 or 0.3, that is, 0.2, 0.4, 0.6, 0.8 or 1.2 standard deviations of the feature. This is a
    choice of this project, with the sizes of the brightness shift of CIFAR-10-C.
    """

    kinds = ("sequences",)
    sizes = (0.05, 0.1, 0.15, 0.2, 0.3)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        return x + self.size * unit * random_signs(seeds, OFFSET, x.shape[2])[:, None]


class TimeWarp(Shift):
    """Time warping: y(t) = x(τ(t)) with the speed τ′(t) = 1 + c · (a cos πt + b cos 2πt).

    t and τ run from 0 at the first valid step to 1 at the last. a and b are random for each sample, with
    `|a| + |b| = 1`, so that the speed is between 1 − c and 1 + c, and time is monotonic. c is 0.1, 0.2, 0.4, 0.6 or
    0.8, a choice of this project. Values are interpolated linearly between steps.

    References:
        Um et al. 2017 (time-warping), https://arxiv.org/abs/1706.00527
    """

    kinds = ("sequences",)
    sizes = (0.1, 0.2, 0.4, 0.6, 0.8)

    def apply(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        num, length = x.shape[:2]
        steps = torch.arange(length, device=x.device).expand(num, -1)
        last = steps[:, -1:] if valid is None else (valid.sum(1, keepdim=True) - 1).clamp(min=0)
        a = 2 * uniform(seeds, BEND)[:, None] - 1
        b = (1 - a.abs()) * random_signs(seeds, DIRECTION)[:, None]
        t = steps / last.clamp(min=1)
        tau = t + self.size * (a * (torch.pi * t).sin() + b * (2 * torch.pi * t).sin() / 2) / torch.pi
        position = (tau * last).clamp(min=0).minimum(last)
        below = position.long()
        above = (below + 1).minimum(last)
        before, after = (x.gather(1, step[..., None].expand_as(x)) for step in (below, above))
        return torch.lerp(before, after, (position - below)[..., None].to(x))


def none() -> Shift | None:
    """Return None: no shift."""
    return None


def random_signs(seeds: Tensor, stream: int, *shape: int) -> Tensor:
    """Return random signs 1 or −1 `(N, *shape)`."""
    return torch.where(normal(seeds, stream, shape) < 0, -1.0, 1.0)


def chunks(inputs: Tensor) -> list[slice]:
    """Return slices of samples with about `CHUNK` values each."""
    size = max(1, CHUNK // max(1, inputs[:1].numel()))
    return [slice(start, start + size) for start in range(0, len(inputs), size)]


def feature_stds(inputs: Tensor, valid: Tensor | None) -> Tensor:
    """Return the standard deviation of each feature over all valid steps `(features)`, in float64."""

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        total, count = torch.zeros(inputs.shape[2], device=inputs.device, dtype=torch.float64), 0
        for rows in chunks(inputs):
            steps = inputs[rows].flatten(0, 1) if valid is None else inputs[rows][valid[rows]]
            total += of(steps.double()).sum(0)
            count += len(steps)
        return total / max(1, count)

    center = mean(lambda steps: steps)
    return mean(lambda steps: (steps - center).square()).sqrt()
