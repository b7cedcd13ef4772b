"""Augmentation of training images: whole batches, on the device, each sample by random numbers of its own."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ablab.data.batch import IGNORED_PIXEL, Batch
from ablab.data.draws import in_epoch, uniform

# Each use of random numbers has a stream of its own, so that switching one off changes no other.
ROW, COLUMN, FLIP, BRIGHTNESS, CONTRAST, SATURATION, HOLE_ROW, HOLE_COLUMN, SHARE, BOX_ROW, BOX_COLUMN, WHICH = range(
    12
)


class Augment:
    """What is done to training images; everything is off unless set.

    In this order: crop, flip, color jitter, standardization (the data's own), cutout, mixup or cutmix. A sample's
    random numbers follow from (seed, epoch, index), so neither workers, processes nor a resume change them. Two samples
    are mixed that stand half a batch apart: in a shuffled order those are random pairs, and they are the same on any
    number of processes that each have an even number of samples.

    Crop and flip move a mask with its image; where crop adds zeros to the image, its pixels are ignored (255).

    Args:
        crop_padding: pixels added on each side, before a window of the old size is cut out anywhere.
        crop_mode: what is added: "reflect" or "zeros" (black).
        flip: "none"; "random", half of the images; "alternating", a random half in the first epoch, and after that
            each image in every other epoch.
        color_jitter: brightness, contrast and saturation are each scaled by a factor between 1 − this and 1 + this.
        cutout: side of a square in pixels that is set to the mean, around a random pixel.
        mixup: both parameters of the Beta distribution of the shares in which two images and their labels are mixed;
            0 is off.
        cutmix: the same, for the area of a rectangle that is replaced by the other image's. With both set, each pair is
            treated in one of the two ways, at random.

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
    def on(self) -> bool:
        """Whether anything is done at all."""
        moved = self.crop_padding or self.flip != "none"
        return bool(moved or self.color_jitter or self.cutout or self.mixup or self.cutmix)

    def before(self, batch: Batch, value_range: tuple[float, float]) -> Batch:
        """What is done to images as they are stored."""
        assert batch.seeds is not None
        own, epoch = batch.seeds.unbind(1)
        images, targets = batch.inputs, batch.targets
        if self.crop_padding or self.flip != "none":
            rows, columns = self.sources(images, own, epoch)
            images = self.looked_up(images, rows, columns, outside=0)
            if targets.dim() == 3:  # masks
                targets = self.looked_up(targets[:, None], rows, columns, outside=IGNORED_PIXEL)[:, 0]
        if self.color_jitter:
            images = self.jittered(images.float(), in_epoch(own, epoch), value_range)
        return batch._replace(inputs=images, targets=targets)

    def after(self, batch: Batch, num_classes: int) -> Batch:
        """What is done to images that are standardized, where 0 is the mean."""
        assert batch.seeds is not None
        if not (self.cutout or self.mixup or self.cutmix):
            return batch
        seeds = in_epoch(*batch.seeds.unbind(1))
        if self.cutout:
            height, width = batch.inputs.shape[2:]
            if self.cutout >= min(height, width):
                raise ValueError(f"augment.cutout={self.cutout}: images of {height}x{width} are no larger; choose less")
            rows, columns = (uniform(seeds, HOLE_ROW) * height).long(), (uniform(seeds, HOLE_COLUMN) * width).long()
            top, left = rows - self.cutout // 2, columns - self.cutout // 2
            hole = box(batch.inputs, top, left, top + self.cutout, left + self.cutout)
            batch = batch._replace(inputs=batch.inputs.masked_fill(hole, 0.0))
        return self.mixed(batch, seeds, num_classes) if self.mixup or self.cutmix else batch

    def sources(self, images: Tensor, own: Tensor, epoch: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `(N, H)` and columns `(N, W)` that crop and flip take pixels from; some may lie outside."""
        height, width = images.shape[2:]
        seeds, padding = in_epoch(own, epoch), self.crop_padding
        if padding >= min(height, width):
            raise ValueError(
                f"augment.crop_padding={padding}: images of {height}x{width} have fewer pixels to pad with; choose less"
            )
        # the three streams in one go: on a GPU, a step has more small operations than time for them
        of_each = torch.stack([seeds, seeds, own if self.flip == "alternating" else seeds])
        drawn = uniform(of_each, torch.arange(ROW, FLIP + 1, device=images.device)[:, None])
        down, right = offsets(drawn[:2], padding)[..., None]
        rows = torch.arange(height, device=images.device) + down
        columns = torch.arange(width, device=images.device) + right
        if self.flip != "none":
            flipped = drawn[2] < 0.5
            if self.flip == "alternating":
                flipped = flipped ^ (epoch % 2 == 1)
            columns = torch.where(flipped[:, None], columns.flip(1), columns)
        return rows, columns

    def looked_up(self, images: Tensor, rows: Tensor, columns: Tensor, *, outside: int) -> Tensor:
        """Images made of the pixels at some rows and columns, reflected, or `outside` where there are none."""
        num, channels, height, width = images.shape
        padding = self.crop_padding
        if self.crop_mode == "reflect":
            rows, columns = reflected(rows, height), reflected(columns, width)
        else:
            images = F.pad(images, (padding,) * 4, value=outside)
            rows, columns = rows + padding, columns + padding
        source = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).view(num, 1, height * width)
        return images.flatten(2).gather(2, source.expand(-1, channels, -1)).view(num, channels, height, width)

    def jittered(self, images: Tensor, seeds: Tensor, value_range: tuple[float, float]) -> Tensor:
        def factor(stream: int) -> Tensor:
            return (1 + self.color_jitter * (2 * uniform(seeds, stream) - 1))[:, None, None, None]

        images = (images * factor(BRIGHTNESS)).clamp(*value_range)
        mean = grey(images).double().mean((1, 2, 3), keepdim=True).to(images.dtype)
        images = away(mean, images, factor(CONTRAST)).clamp(*value_range)
        if images.shape[1] == 3:
            images = away(grey(images), images, factor(SATURATION)).clamp(*value_range)
        return images

    def mixed(self, batch: Batch, seeds: Tensor, num_classes: int) -> Batch:
        """Every image mixed with the one half a batch away; its own share is the larger one."""
        images, half = batch.inputs, len(seeds) // 2
        if half == 0:
            raise ValueError(
                "augment.mixup, augment.cutmix: a process with one sample of a batch has none to mix it with"
            )
        other = images.roll(half, 0)
        cut = uniform(seeds, WHICH) < 0.5 if self.mixup and self.cutmix else torch.full_like(seeds, bool(self.cutmix))
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
            inside = box(images, top, left, top + tall, left + wide) & cut[:, None, None, None]
            result = torch.where(inside, other, result)
            share = torch.where(cut, 1 - tall * wide / (height * width), share)
        own = F.one_hot(batch.targets, num_classes) * share[:, None]
        others = F.one_hot(batch.targets.roll(half, 0), num_classes) * (1 - share)[:, None]
        return batch._replace(inputs=result, mixed=own + others)

    def quantile(self, name: Literal["mixup", "cutmix"], at: Tensor) -> Tensor:
        """Shares of at least one half from the Beta distribution, by its quantiles at uniform numbers.

        The distribution is symmetric and so are pairs: the larger share may as well be the sample's own.
        """
        table = self.tables[name].to(at.device)
        position = at * (len(table) - 1)
        below = position.long()
        return torch.lerp(table[below], table[below + 1], position - below)

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """Quantiles of the larger share at equal distances, for each way of mixing."""
        from scipy.stats import beta

        at = 0.5 + 0.5 * torch.linspace(0, 1, 4097).double()
        return {
            name: torch.as_tensor(beta.ppf(at.numpy(), value, value)).float()
            for name, value in (("mixup", self.mixup), ("cutmix", self.cutmix))
            if value
        }


def offsets(drawn: Tensor, padding: int) -> Tensor:
    """Whole numbers from −padding to padding, from uniform ones."""
    return (drawn * (2 * padding + 1)).long() - padding


def reflected(positions: Tensor, size: int) -> Tensor:
    """Positions outside 0 … size − 1, mirrored at the border pixels' centers."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def box(images: Tensor, top: Tensor, left: Tensor, bottom: Tensor, right: Tensor) -> Tensor:
    """Where a rectangle of each image is `(N, 1, H, W)`; what lies outside the image is cut off."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def grey(images: Tensor) -> Tensor:
    """Luma `(N, 1, H, W)` (ITU-R BT.601); images of another number of channels are averaged."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def away(centre: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Images with their distance from a centre scaled.

    One operation after another, here and in `grey`: what torch computes in one (lerp, einsum) it rounds otherwise for
    batches of other sizes.
    """
    return centre + (images - centre) * factor
