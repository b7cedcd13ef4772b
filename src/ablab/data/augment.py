"""Batched augmentation of training images on the device, with reproducible random numbers per sample."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.data.batch import IGNORED_PIXEL, Batch
from ablab.data.rng import epoch_seeds, uniform

# Each augmentation has its own random stream, so that switching one off does not affect the others.
ROW, COLUMN, FLIP, BRIGHTNESS, CONTRAST, SATURATION, HOLE_ROW, HOLE_COLUMN, SHARE, BOX_ROW, BOX_COLUMN, MIX_METHOD = (
    range(12)
)


class Augment:
    """Augmentation of training images; every augmentation is off by default.

    The order is: crop, flip, color jitter, standardization (by the data module), cutout, mixup or cutmix. The random
    numbers of a sample depend on (seed, epoch, index) only, and not on workers, processes or resumed runs. Mixing
    combines samples half a batch apart: random pairs in a shuffled order, and the same pairs for any number of
    processes with an even number of samples each.

    Crop and flip also transform masks; pixels that crop fills with zeros are ignored (255) in the mask.

    Args:
        crop_padding: pixels of padding on each side, before a random window of the original size is cropped.
        crop_mode: padding mode, "reflect" or "zeros" (black).
        flip: "none"; "random" flips half of the images; "alternating" flips a random half in the first epoch, and each
            image in every second epoch from then on.
        color_jitter: maximum relative change of brightness, contrast and saturation, from 0 to 1.
        cutout: side length in pixels of a square around a random pixel that is set to the mean.
        mixup: parameter of the symmetric Beta distribution of the mixing weight; 0 is off.
        cutmix: parameter of the symmetric Beta distribution of the area that is kept; 0 is off. With both mixup and
            cutmix, each pair is treated by one of the two, at random.

    Shape:
        inputs `(N, C, H, W)`

    References:
        He et al. 2015 (crop, flip), https://arxiv.org/abs/1512.03385;
        Jordan 2024 (alternating flip), https://arxiv.org/abs/2404.00498;
        DeVries & Taylor 2017 (cutout), https://arxiv.org/abs/1708.04552;
        Zhang et al. 2017 (mixup), https://arxiv.org/abs/1710.09412;
        Yun et al. 2019 (cutmix), https://arxiv.org/abs/1905.04899
    """

    def __init__(
        self,
        *,
        crop_padding: int = 0,
        crop_mode: Literal["reflect", "zeros"] = "reflect",
        flip: Literal["none", "random", "alternating"] = "none",
        color_jitter: float = 0.0,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        if crop_mode not in ("reflect", "zeros"):
            raise ValueError(f"crop_mode={crop_mode}: reflect or zeros is needed")
        if flip not in ("none", "random", "alternating"):
            raise ValueError(f"flip={flip}: none, random or alternating is needed")
        if not 0 <= color_jitter <= 1:
            raise ValueError(f"color_jitter={color_jitter}: a share from 0 to 1 is needed")
        for name, value in (("crop_padding", crop_padding), ("cutout", cutout), ("mixup", mixup), ("cutmix", cutmix)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: 0 (off) or more is needed")
        self.crop_padding = crop_padding
        self.crop_mode = crop_mode
        self.flip = flip
        self.color_jitter = color_jitter
        self.cutout = cutout
        self.mixup = mixup
        self.cutmix = cutmix

    @property
    def is_enabled(self) -> bool:
        """Return whether any augmentation is enabled."""
        moved = self.crop_padding or self.flip != "none"
        return bool(moved or self.color_jitter or self.cutout or self.mixup or self.cutmix)

    def augment_raw(self, batch: Batch, value_range: tuple[float, float]) -> Batch:
        """Apply crop, flip and color jitter, to images with values in their original range."""
        assert batch.seeds is not None
        own, epoch = batch.seeds.unbind(1)
        images, targets = batch.inputs, batch.targets
        if self.crop_padding or self.flip != "none":
            rows, columns = self.source_positions(images, own, epoch)
            images = self.gather_pixels(images, rows, columns, outside=0)
            if targets.dim() == 3:  # masks
                targets = self.gather_pixels(targets[:, None], rows, columns, outside=IGNORED_PIXEL)[:, 0]
        if self.color_jitter:
            images = self.jitter_colors(images.float(), epoch_seeds(own, epoch), value_range)
        return batch._replace(inputs=images, targets=targets)

    def augment_standardized(self, batch: Batch, num_classes: int) -> Batch:
        """Apply cutout, mixup and cutmix, to standardized images."""
        assert batch.seeds is not None
        if not (self.cutout or self.mixup or self.cutmix):
            return batch
        seeds = epoch_seeds(*batch.seeds.unbind(1))
        if self.cutout:
            height, width = batch.inputs.shape[2:]
            if self.cutout >= min(height, width):
                raise ValueError(f"augment.cutout={self.cutout}: images of {height}x{width} are no larger; choose less")
            rows, columns = (uniform(seeds, HOLE_ROW) * height).long(), (uniform(seeds, HOLE_COLUMN) * width).long()
            top, left = rows - self.cutout // 2, columns - self.cutout // 2
            hole = box_mask(batch.inputs, top, left, top + self.cutout, left + self.cutout)
            batch = batch._replace(inputs=batch.inputs.masked_fill(hole, 0.0))
        return self.mix(batch, seeds, num_classes) if self.mixup or self.cutmix else batch

    def source_positions(self, images: Tensor, own: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the source rows `(N, H)` and columns `(N, W)` of crop and flip, which may lie outside the image."""
        height, width = images.shape[2:]
        seeds, padding = epoch_seeds(own, epoch), self.crop_padding
        if padding >= min(height, width):
            raise ValueError(
                f"augment.crop_padding={padding}: images of {height}x{width} have fewer pixels to pad with; choose less"
            )
        # one call for the three streams: on a GPU, the number of small kernels limits the step time
        of_each = torch.stack([seeds, seeds, own if self.flip == "alternating" else seeds])
        drawn = uniform(of_each, torch.arange(ROW, FLIP + 1, device=images.device)[:, None])
        down, right = integer_offsets(drawn[:2], padding)[..., None]
        rows = torch.arange(height, device=images.device) + down
        columns = torch.arange(width, device=images.device) + right
        if self.flip != "none":
            flipped = drawn[2] < 0.5
            if self.flip == "alternating":
                flipped = flipped ^ (epoch % 2 == 1)
            columns = torch.where(flipped[:, None], columns.flip(1), columns)
        return rows, columns

    def gather_pixels(self, images: Tensor, rows: Tensor, columns: Tensor, *, outside: int) -> Tensor:
        """Gather pixels at rows and columns; positions outside the image are reflected, or filled with `outside`."""
        num, channels, height, width = images.shape
        padding = self.crop_padding
        if self.crop_mode == "reflect":
            rows, columns = reflect(rows, height), reflect(columns, width)
        else:
            images = F.pad(images, (padding,) * 4, value=outside)
            rows, columns = rows + padding, columns + padding
        source = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).view(num, 1, height * width)
        return images.flatten(2).gather(2, source.expand(-1, channels, -1)).view(num, channels, height, width)

    def jitter_colors(self, images: Tensor, seeds: Tensor, value_range: tuple[float, float]) -> Tensor:
        """Scale brightness, contrast and, in color images, saturation by random factors."""

        def factor(stream: int) -> Tensor:
            return (1 + self.color_jitter * (2 * uniform(seeds, stream) - 1))[:, None, None, None]

        images = (images * factor(BRIGHTNESS)).clamp(*value_range)
        mean = to_grayscale(images).double().mean((1, 2, 3), keepdim=True).to(images.dtype)
        images = scale_distance(mean, images, factor(CONTRAST)).clamp(*value_range)
        if images.shape[1] == 3:
            images = scale_distance(to_grayscale(images), images, factor(SATURATION)).clamp(*value_range)
        return images

    def mix(self, batch: Batch, seeds: Tensor, num_classes: int) -> Batch:
        """Mix every image with the one half a batch away, with a weight of at least 0.5 for the image itself."""
        images, half = batch.inputs, len(seeds) // 2
        if half == 0:
            raise ValueError(
                "augment.mixup, augment.cutmix: a process with one sample of a batch has none to mix it with"
            )
        other = images.roll(half, 0)
        cut = (
            uniform(seeds, MIX_METHOD) < 0.5
            if self.mixup and self.cutmix
            else torch.full_like(seeds, bool(self.cutmix))
        )
        cut = cut.bool()
        blended = self.quantile("mixup", uniform(seeds, SHARE)) if self.mixup else torch.ones_like(seeds).float()
        share = torch.where(cut, 1.0, blended)
        result = torch.lerp(other, images, share[:, None, None, None])
        if self.cutmix:
            height, width = images.shape[2:]
            kept = self.quantile("cutmix", uniform(seeds, SHARE))
            tall, wide = ((1 - kept).sqrt() * height).round().long(), ((1 - kept).sqrt() * width).round().long()
            top = (uniform(seeds, BOX_ROW) * (height - tall + 1)).long()
            left = (uniform(seeds, BOX_COLUMN) * (width - wide + 1)).long()
            inside = box_mask(images, top, left, top + tall, left + wide) & cut[:, None, None, None]
            result = torch.where(inside, other, result)
            share = torch.where(cut, 1 - tall * wide / (height * width), share)
        own = F.one_hot(batch.targets, num_classes) * share[:, None]
        others = F.one_hot(batch.targets.roll(half, 0), num_classes) * (1 - share)[:, None]
        return batch._replace(inputs=result, mixed=own + others)

    def quantile(self, name: Literal["mixup", "cutmix"], at: Tensor) -> Tensor:
        """Sample weights of at least 0.5 from the Beta distribution, by inverse transform sampling.

        The restriction loses nothing: the distribution is symmetric, and each image of a pair is also mixed.
        """
        table = self.tables[name].to(at.device)
        position = at * (len(table) - 1)
        below = position.long()
        return torch.lerp(table[below], table[below + 1], position - below)

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """Equidistant quantiles of the larger weight, for mixup and cutmix."""
        from scipy.stats import beta

        at = 0.5 + 0.5 * torch.linspace(0, 1, 4097).double()
        return {
            name: torch.as_tensor(beta.ppf(at.numpy(), value, value)).float()
            for name, value in (("mixup", self.mixup), ("cutmix", self.cutmix))
            if value
        }


def integer_offsets(drawn: Tensor, padding: int) -> Tensor:
    """Convert uniform numbers in [0, 1) to integers from −padding to padding."""
    return (drawn * (2 * padding + 1)).long() - padding


def reflect(positions: Tensor, size: int) -> Tensor:
    """Reflect positions outside 0 … size − 1 at the centers of the border pixels."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def box_mask(images: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Return the mask `(N, 1, H, W)` of a rectangle in each image, clipped to the image."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def to_grayscale(images: Tensor) -> Tensor:
    """Return the luma `(N, 1, H, W)` (ITU-R BT.601) of RGB images, and the channel mean of other images."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def scale_distance(centre: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of images from a centre.

    Uses single operations, here and in `to_grayscale`: fused ones (lerp, einsum) round differently for different batch
    sizes.
    """
    return centre + (images - centre) * factor
