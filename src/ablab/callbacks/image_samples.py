"""Save generated images during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from ablab.data.labelled import LabelledData


class ImageSamples(L.Callback):
    """Save a grid of generated images as `pictures.png` in the run folder after each validation.

    The task generates the images in its method `sample_images`, from the same noise each time.

    Args:
        num_images: number of images, arranged in a square grid.
    """

    def __init__(self, *, num_images: int = 64) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images}: at least 1 is needed")
        self.num_images = num_images

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or not isinstance(data, LabelledData) or not hasattr(pl_module, "sample_images"):
            return
        make: Any = pl_module.sample_images
        with torch.no_grad():
            images = make(self.num_images).float()
        if trainer.is_global_zero:
            low, high = data.value_range
            images = (images * data.std.to(images.device) + data.mean.to(images.device) - low) / (high - low)
            make_grid(images.cpu()).save(Path(trainer.loggers[0].save_dir or ".") / "pictures.png")


def make_grid(images: Tensor) -> Image.Image:
    """Arrange images with values in [0, 1] in a grid with gaps of one pixel; grayscale unless they have 3 channels."""
    number, channels, height, width = images.shape
    columns = math.ceil(number**0.5)
    grid = torch.zeros(-(-number // columns) * (height + 1), columns * (width + 1), channels)
    for i, image in enumerate(images.clamp(0, 1)):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        grid[top : top + height, left : left + width] = image.permute(1, 2, 0)
    pixels = (grid * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])
