"""Encoded images (PNG, JPEG, …), decoded once into a memory-mapped cache."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ablab.data.batch import Kind, Samples, sample_digest
from ablab.data.cache import CacheEntry, EntryWriter, content_key, get_or_create
from ablab.data.labelled import LabelledData
from ablab.status import with_progress

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}
EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
DECODER = 2  # version of the decoding below; increase it when results change, to invalidate caches
CODECS = ("avif", "jpg", "jpg_2000", "libjpeg_turbo", "libtiff", "webp")  # Pillow's libraries that affect pixels
TRANSPARENT = "with transparent pixels, laid over white"
ANIMATED = "with several frames, the first one taken"
NOT_ANIMATED = ("MPO", "PSD")  # their other frames are camera previews and layers


@dataclass(frozen=True)
class Encoded:
    """Encoded images with class labels.

    Args:
        images: bytes or file of each image.
        targets: class index of each image.
        where: returns the location of an image, for error messages.
    """

    images: Sequence[bytes | Path]
    targets: Sequence[int]
    where: Callable[[int], str]


class EncodedImages(LabelledData):
    """Base class of image data sets that are decoded at first use, and memory-mapped afterwards.

    Images are rotated according to their EXIF orientation, as in `datasets`, and transparent pixels are composited over
    white. The cache is in ABLAB_CACHE or ~/.cache/ablab; its keys cover the content of the files and everything that
    affects the pixels.

    Args:
        image_size: side length in pixels: resizes the shorter side, then center-crops. None keeps the images, which
            must all have the same size.
        in_channels: 3 for color, 1 for grayscale.
        settings: see `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, in_channels, H, W)`, targets `(N)`
    """

    kind: ClassVar[Kind] = "images"
    keep: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, *, image_size: int | None = None, in_channels: Literal[1, 3] = 3, **settings: Any) -> None:
        super().__init__(**settings)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size={image_size}: at least 1 pixel is needed, or null for images as they are")
        self.image_size = image_size
        self.in_channels = in_channels
        self.notes: Counter[str] = Counter()  # numbers of transparent and animated images

    def cache_key(self, *parts: str | bytes | int | Path) -> str:
        """Return the cache key of images that are decoded from these parts."""
        from PIL import features

        codecs = (f"{name} {features.version(name)}" for name in CODECS)
        return content_key(DECODER, metadata.version("pillow"), *codecs, str(self.image_size), self.in_channels, *parts)

    def decode_split(self, key: str, read: Callable[[], tuple[Encoded, list[str]]]) -> tuple[Samples, list[str]]:
        """Return the samples of a split and its class names, from the cache if possible.

        Args:
            key: the cache key, from `cache_key`.
            read: returns the encoded images and class names; called only if they are not cached.

        Raises:
            ValueError: an image cannot be decoded or has a different size, or there are no images.
        """

        def make(writer: EntryWriter) -> None:
            encoded, class_names = read()
            writer.facts["class_names"] = class_names
            decode(encoded, writer, self.image_size, self.in_channels)

        stored: CacheEntry = get_or_create(key, make)
        self.notes = self.notes + Counter(stored.facts.get("notes", {}))
        images, targets, digests = (stored.tensors[name] for name in ("images", "targets", "digests"))
        return Samples(images, targets, content=stored.digest, digests=digests), stored.facts["class_names"]

    def caveats(self) -> list[str]:
        return [*super().caveats(), *(f"images {note} ({count:,})" for note, count in sorted(self.notes.items()))]

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": self.in_channels, "num_classes": len(self.class_names)}


def decode(encoded: Encoded, writer: EntryWriter, image_size: int | None, in_channels: int) -> None:
    """Decode all images in parallel into the arrays `images`, `targets` and `digests` of a cache entry."""
    num = len(encoded.images)
    if not num:
        raise ValueError("there are no images in it")
    size = load_image(encoded, 0, image_size, in_channels).shape[1:]
    images = writer.array("images", (num, in_channels, *size), "uint8")
    digests = writer.array("digests", (num,), "int64", derived=True)
    notes: list[str] = []  # list.append is thread-safe

    def fill(i: int) -> None:
        image = load_image(encoded, i, image_size, in_channels, notes)
        if image.shape[1:] != size:
            height, width = image.shape[1:]
            raise ValueError(
                f"{encoded.where(i)}: it has {height}x{width} pixels, and the first image {size[0]}x{size[1]}; "
                "set data.image_size to bring all to one size"
            )
        images[i] = image.numpy()
        digests[i] = sample_digest(images[i].tobytes())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in with_progress(pool.map(fill, range(num), chunksize=256), num, "decoding images, once for all runs"):
            pass
    writer.array("targets", (num,), "int64")[:] = encoded.targets
    if notes:
        writer.facts["notes"] = Counter(notes)


def load_image(
    encoded: Encoded, i: int, image_size: int | None, in_channels: int, notes: list[str] | None = None
) -> Tensor:
    """Decode an image to `(C, H, W)`, uint8.

    Args:
        encoded, i: the images, and the index of one of them.
        image_size, in_channels: see `EncodedImages`.
        notes: see `open_image`.

    Raises:
        ValueError: see `open_image`.
    """
    image = open_image(encoded.images[i], lambda: encoded.where(i), in_channels, notes)
    return to_tensor(image if image_size is None else resize_and_crop(image, image_size))


def open_image(
    source: bytes | Path, where: Callable[[], str], in_channels: int, notes: list[str] | None = None
) -> Image.Image:
    """Decode an image and convert it to grayscale or RGB.

    Args:
        source: bytes or file of the image.
        where: returns the location of the image, for error messages.
        in_channels: see `EncodedImages`.
        notes: a list to append TRANSPARENT and ANIMATED to, if they apply.

    Raises:
        ValueError: the image cannot be decoded, or has more than 8 bits per channel.
    """
    from PIL import ExifTags, Image, ImageOps

    found: list[str] = []
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if getattr(opened, "is_animated", False) and opened.format not in NOT_ANIMATED:
                found.append(ANIMATED)
            opened.load()
            mode: str = opened.mode
            image: Image.Image = opened
            if mode in EIGHT_BITS:
                if opened.getexif().get(ExifTags.Base.Orientation) is not None:
                    image = ImageOps.exif_transpose(opened)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    if image.getchannel("A").getextrema() != (255, 255):
                        found.append(TRANSPARENT)
                        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                image = image.convert(MODES[in_channels])
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions
        raise ValueError(f"{where()}: it cannot be decoded ({error}); replace it, or leave it out") from error
    if mode not in EIGHT_BITS:
        raise ValueError(f"{where()}: it has more than 8 bits a channel (mode {mode}); convert it first")
    if notes is not None:
        notes += found
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to a tensor `(C, H, W)`."""
    import numpy as np

    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def resize_and_crop(image: Image.Image, size: int, resample: Image.Resampling | None = None) -> Image.Image:
    """Resize the shorter side of an image to `size` (bicubic by default), then center-crop to a square."""
    from PIL import Image

    resample = Image.Resampling.BICUBIC if resample is None else resample
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), resample)
    return image.crop((left, top, left + size, top + size))
