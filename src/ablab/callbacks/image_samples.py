"""Generated images, as a picture."""

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
    """Writes generated images to `pictures.png` in the run's folder, after each validation.

    The task makes them, by a method `sample_images`, from the same noise each time.

    Args:
        num_images: in the picture, as many rows as columns.
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
            tile(images.cpu()).save(Path(trainer.loggers[0].save_dir or ".") / "pictures.png")


def tile(images: Tensor) -> Image.Image:
    """Return images with values from 0 to 1 side by side, one pixel apart; grey unless they have three channels."""
    number, channels, height, width = images.shape
    columns = math.ceil(number**0.5)
    grid = torch.zeros(-(-number // columns) * (height + 1), columns * (width + 1), channels)
    for place, image in enumerate(images.clamp(0, 1)):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        grid[top : top + height, left : left + width] = image.permute(1, 2, 0)
    pixels = (grid * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])
