"""The path of images to the training step, against the usual one, sample by sample with Pillow."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ablab.data.augment import Augment
from ablab.data.batch import Samples
from ablab.data.labelled import LabelledData
from ablab.data.synthetic import SyntheticImages
from benchmarks.measuring import Ratio, Step, measure

BATCH, BATCHES, PADDING, WORKERS = 512, 16, 4, 2


class PerSample(Dataset[tuple[Tensor, int]]):
    """Images as torchvision data sets load them: opened with Pillow, cropped, flipped, then converted to a tensor."""

    def __init__(self, images: list[Any], targets: list[int], open_image: Callable[[Any], Image.Image]) -> None:
        self.images = images
        self.targets = targets
        self.open_image = open_image
        self.mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
        self.std = torch.tensor([0.247, 0.2435, 0.2616]).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(self.open_image(self.images[i]), PADDING)
        left, top = random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)
        image = image.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (tensor - self.mean) / self.std, self.targets[i]


def data(rounds: int, device: torch.device, root: Path | None) -> Iterator[Ratio]:
    """Measure cropped, flipped and standardized batches of 512 images of 32x32, 16 batches at a time.

    Args:
        root: a folder with the parquet files of CIFAR-10; None generates images of the same size.
    """
    ours = training_data(root, device)
    assert ours.splits is not None
    assert isinstance(ours.splits.train, Samples)
    batch = ours.splits.train[range(BATCH * BATCHES)]
    pixels, targets = [image.permute(1, 2, 0).numpy() for image in batch.inputs.cpu()], batch.targets.tolist()
    encoded = [encode(image) for image in pixels]
    peers = {
        "PIL decode": PerSample(encoded, targets, lambda data: Image.open(io.BytesIO(data)).convert("RGB")),
        "PIL, decoded": PerSample(pixels, targets, Image.fromarray),
    }
    step = epoch(ours, device)
    for name, peer in peers.items():
        loader = DataLoader(peer, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
        ratio = measure("CIFAR-10", "crop, flip, standardize", step, name, lambda loader=loader: drain(loader), rounds)
        yield ratio
        print(f"    {BATCH * BATCHES / ratio.ours * 1000:,.0f} images a second; {1 / ratio.median:.1f} x the peer")
    for what, augment in {
        "color_jitter": Augment(color_jitter=0.4),
        "cutout": Augment(cutout=8),
        "mixup": Augment(mixup=1.0),
        "cutmix": Augment(cutmix=1.0),
    }.items():
        plain, other = training_data(root, device, Augment()), training_data(root, device, augment)
        yield measure("CIFAR-10", what, epoch(other, device), "not augmented", epoch(plain, device), rounds)


def training_data(root: Path | None, device: torch.device, augment: Augment | None = None) -> LabelledData:
    from ablab.data.hf_image import HFImage

    settings: dict[str, Any] = {"batch_size": BATCH, "augment": augment or Augment(crop_padding=PADDING, flip="random")}
    found: LabelledData
    if root is None:
        found = SyntheticImages(num_samples=2 * BATCH * BATCHES, **settings)
    else:
        found = HFImage(name="uoft-cs/cifar10", root=str(root), image_column="img", **settings)
    found.setup()
    if device.type == "cuda":
        assert found.splits is not None
        assert isinstance(found.splits.train, Samples)
        moved = {t: t.to(device) for t in found.splits.train.tensors if t is not None}
        found.splits = replace(found.splits, train=found.splits.train.on(moved))
    return found


def epoch(data: LabelledData, device: torch.device) -> Step:
    """Yield the first 16 batches of an epoch as the model receives them."""
    loader = data.train_dataloader()

    def step() -> None:
        for _, batch in zip(range(BATCHES), loader, strict=False):
            data.on_after_batch_transfer(batch, 0)

    return step


def drain(loader: DataLoader[Any]) -> None:
    for _ in loader:
        pass


def encode(image: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()
