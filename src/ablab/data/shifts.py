"""Covariate shift: test inputs that are corrupted on purpose, by a declared amount, while their labels stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.data.batch import Kind
from ablab.data.draws import normal, sample_seeds, uniform

PIECE = 1 << 22  # values that are changed at a time, so that memory stays bounded

# Each use of random numbers has a stream of its own.
NOISE, TURN, FACTOR, OFFSET, BEND, DIRECTION = range(6)


class Shift(ABC):
    """A corruption of test inputs: P(x) moves, P(y | x) stays.

    The severity is the size of the change, the same for every sample. What is random about it follows from (seed, the
    sample's place in the data set) alone: severities share their random numbers.

    Sizes are shares of a unit, so that they mean the same for all data. For images it is the range of their values; the
    results stay within it. For sequences it is four standard deviations of a feature (a range that holds 95 % of
    normally distributed values), taken over the valid steps of all given samples; padding stays as it is.

    Args:
        severity: from 1 to 5.
        seed: decides the random numbers.

    Raises:
        ValueError: there is no such severity.
    """

    kinds: ClassVar[tuple[Kind, ...]]
    moves_pixels: ClassVar[bool] = False  # so that a mask would no longer fit its image
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
        """What the severity stands for."""
        return self.sizes[self.severity - 1]

    @abstractmethod
    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        """Some of the samples, changed.

        Shape:
            images: x `(N, C, H, W)`, scaled to 0 … 1, unit `()`
            sequences: x `(N, L, features)`, unit `(features)`, valid `(N, L)`
            seeds `(N)`
        """

    def __call__(self, inputs: Tensor, valid: Tensor | None = None, *, low: float = 0.0, high: float = 255.0) -> Tensor:
        """All inputs of a data set, changed; whole numbers are rounded and stay from `low` to `high`.

        Args:
            low, high: the range of the values, of images and of sequences of whole numbers.

        Shape:
            inputs `(N, C, H, W)` or `(N, L, features)`, valid `(N, L)`: real steps, which come first -> as inputs
        """
        images = inputs.dim() == 4
        assert ("images" if images else "sequences") in self.kinds
        precise = torch.promote_types(inputs.dtype, torch.float32)
        unit = (inputs.new_ones((), dtype=precise) if images else 4 * deviations(inputs, valid)).to(precise)
        seeds = sample_seeds(self.seed, 0, torch.arange(len(inputs), device=inputs.device))
        result = torch.empty_like(inputs)
        for rows in pieces(inputs):
            x, real = inputs[rows].to(precise), None if valid is None else valid[rows]
            if images:
                y = self.changed((x - low) / (high - low), seeds[rows], unit, real).clamp(0, 1) * (high - low) + low
            else:
                y = self.changed(x, seeds[rows], unit, real)
            if not inputs.is_floating_point():
                y = y.round().clamp(low, high)
            result[rows] = y if real is None else torch.where(real[..., None], y, x)
        return result


class GaussianNoise(Shift):
    """Noise on every value: y = x + c · unit · n, n normally distributed.

    c is 0.04, 0.06, 0.08, 0.09 or 0.10, the severities of CIFAR-10-C. For sequences that is a standard deviation of
    0.16, 0.24, 0.32, 0.36 or 0.40 of the feature's own; for them it is this project's choice.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261;
        Um et al. 2017 (sequences: jittering), https://arxiv.org/abs/1706.00527
    """

    kinds = ("images", "sequences")
    sizes = (0.04, 0.06, 0.08, 0.09, 0.10)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        return x + self.size * unit * normal(seeds, NOISE, tuple(x.shape[1:]))


class GaussianBlur(Shift):
    """Each channel convolved with a Gaussian whose standard deviation is c pixels.

    c is 0.4, 0.6, 0.7, 0.8 or 1, the severities of CIFAR-10-C. The kernel is cut off at 4 · c; beyond the border the
    outermost pixels go on.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.4, 0.6, 0.7, 0.8, 1.0)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        radius = round(4 * self.size)
        distance = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = torch.softmax(-0.5 * (distance / self.size) ** 2, 0)
        planes = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view(x.shape)


class Contrast(Shift):
    """Less contrast: y = mean + c · (x − mean), the mean of each channel of each image.

    c is 0.75, 0.5, 0.4, 0.3 or 0.15, the severities of CIFAR-10-C.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.75, 0.5, 0.4, 0.3, 0.15)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return mean + self.size * (x - mean)


class Brightness(Shift):
    """More brightness: c is added to the value of HSV, max over the channels, and hue and saturation stay.

    y = x · min(v + c, 1) / v, v = max over the channels of x. With a single channel that is x + c. c is 0.05, 0.1,
    0.15, 0.2 or 0.3, the severities of CIFAR-10-C. Images of few levels have equal ones among them: of 16 levels, c is
    1, 2, 2, 3 or 5.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.05, 0.1, 0.15, 0.2, 0.3)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        value = x.amax(1, keepdim=True)
        brighter = (value + self.size).clamp(max=1)
        return torch.where(value > 0, x * (brighter / value), brighter)  # black has no hue and turns grey


class Pixelate(Shift):
    """Fewer pixels: the image is made of ⌊c · H⌋ x ⌊c · W⌋ blocks, each the mean of its pixels.

    c is 0.95, 0.9, 0.85, 0.75 or 0.65, the severities of CIFAR-10-C. They are meant for 32 pixels and are too close for
    small images: 8 pixels become 7, 7, 6, 6 or 5, and the 5 happen to fit the digits better than the 6.

    References:
        Hendrycks & Dietterich 2019, https://arxiv.org/abs/1903.12261
    """

    kinds = ("images",)
    sizes = (0.95, 0.9, 0.85, 0.75, 0.65)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        rows, columns = (self.averaging(length).to(x) for length in x.shape[2:])
        return rows @ x @ columns.T

    def averaging(self, length: int) -> Tensor:
        """The matrix that replaces each pixel of a line by the mean of its block."""
        count = max(1, int(self.size * length))
        block = (2 * torch.arange(length) + 1) * count // (2 * length)  # where the pixel's center lies
        same = (block[:, None] == block).double()
        return same / same.sum(1, keepdim=True)


class Rotation(Shift):
    """Rotation around the center by 5, 10, 15, 20 or 30 degrees, one way or the other.

    The direction is random. Pixels are interpolated bilinearly; what comes from outside the image has the lowest value
    of the range (black). The severities are this project's choice; 30 degrees is the largest angle of Engstrom et al.

    References:
        Engstrom et al. 2019, https://arxiv.org/abs/1712.02779
    """

    kinds = ("images",)
    moves_pixels = True
    sizes = (5.0, 10.0, 15.0, 20.0, 30.0)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        height, width = x.shape[2:]
        angle = math.radians(self.size) * signs(seeds, TURN).to(x)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # coordinates go from −1 to 1 along either side, whatever its length
        matrix = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)


class Gain(Shift):
    """Sensors that read too much or too little: y = x · c or y = x / c, one or the other for each sample.

    c is 1.1, 1.2, 1.4, 1.7 or 2, this project's choice.

    References:
        Um et al. 2017 (scaling), https://arxiv.org/abs/1706.00527
    """

    kinds = ("sequences",)
    sizes = (1.1, 1.2, 1.4, 1.7, 2.0)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        return x * (self.size ** signs(seeds, FACTOR))[:, None, None]


class Offset(Shift):
    """Sensors with a bias: y = x ± c · unit, the sign drawn for each sample and feature.

    c is 0.05, 0.1, 0.15, 0.2 or 0.3: 0.2, 0.4, 0.6, 0.8 or 1.2 standard deviations of the feature. They are this
    project's choice, after the brightness of CIFAR-10-C.
    """

    kinds = ("sequences",)
    sizes = (0.05, 0.1, 0.15, 0.2, 0.3)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        return x + self.size * unit * signs(seeds, OFFSET, x.shape[2])[:, None]


class TimeWarp(Shift):
    """Time that runs faster here and slower there: y(t) = x(τ(t)), speed τ′(t) = 1 + c · (a cos πt + b cos 2πt).

    t goes from 0 at the first valid step to 1 at the last, and so does τ. a and b are drawn for each sample with
    `|a| + |b| = 1`, so that the speed is from 1 − c to 1 + c and time never runs backwards. c is 0.1, 0.2, 0.4, 0.6 or
    0.8, this project's choice. Between two steps, values are interpolated linearly.

    References:
        Um et al. 2017 (time-warping), https://arxiv.org/abs/1706.00527
    """

    kinds = ("sequences",)
    sizes = (0.1, 0.2, 0.4, 0.6, 0.8)

    def changed(self, x: Tensor, seeds: Tensor, unit: Tensor, valid: Tensor | None) -> Tensor:
        num, length = x.shape[:2]
        steps = torch.arange(length, device=x.device).expand(num, -1)
        last = steps[:, -1:] if valid is None else (valid.sum(1, keepdim=True) - 1).clamp(min=0)
        a = 2 * uniform(seeds, BEND)[:, None] - 1
        b = (1 - a.abs()) * signs(seeds, DIRECTION)[:, None]
        t = steps / last.clamp(min=1)
        tau = t + self.size * (a * (torch.pi * t).sin() + b * (2 * torch.pi * t).sin() / 2) / torch.pi
        position = (tau * last).clamp(min=0).minimum(last)
        below = position.long()
        above = (below + 1).minimum(last)
        before, after = (x.gather(1, step[..., None].expand_as(x)) for step in (below, above))
        return torch.lerp(before, after, (position - below)[..., None].to(x))


def none() -> Shift | None:
    """No shift: the test inputs as they are."""
    return None


def signs(seeds: Tensor, stream: int, *shape: int) -> Tensor:
    """1 or −1, each in half of the cases, `(N, *shape)`."""
    return torch.where(normal(seeds, stream, shape) < 0, -1.0, 1.0)


def pieces(inputs: Tensor) -> list[slice]:
    """All samples, as many at a time as have `PIECE` values."""
    size = max(1, PIECE // max(1, inputs[:1].numel()))
    return [slice(start, start + size) for start in range(0, len(inputs), size)]


def deviations(inputs: Tensor, valid: Tensor | None) -> Tensor:
    """The standard deviation of each feature over all samples' valid steps `(features)`, in float64."""

    def mean(of: Callable[[Tensor], Tensor]) -> Tensor:
        total, count = torch.zeros(inputs.shape[2], device=inputs.device, dtype=torch.float64), 0
        for rows in pieces(inputs):
            steps = inputs[rows].flatten(0, 1) if valid is None else inputs[rows][valid[rows]]
            total += of(steps.double()).sum(0)
            count += len(steps)
        return total / max(1, count)

    center = mean(lambda steps: steps)
    return mean(lambda steps: (steps - center).square()).sqrt()
