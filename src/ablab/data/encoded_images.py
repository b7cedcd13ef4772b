"""Encoded images (PNG, JPEG, …), decoded once into a mapped cache."""

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
from ablab.data.cache import Stored, Writer, cached, content_key
from ablab.data.labelled import LabelledData
from ablab.status import with_progress

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}
EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
DECODER = 2  # of the code below: raised with every change of its results, so that older caches are left alone
CODECS = ("avif", "jpg", "jpg_2000", "libjpeg_turbo", "libtiff", "webp")  # libraries of Pillow that decide pixels
TRANSPARENT = "with transparent pixels, laid over white"
ANIMATED = "with several frames, the first one taken"
NOT_ANIMATED = ("MPO", "PSD")  # their further frames are a camera's previews, and layers


@dataclass(frozen=True)
class Encoded:
    """The encoded images of a split.

    Args:
        images: the bytes of an image, or its file.
        targets: their classes, as numbers.
        where: says where an image is to be found, for an error.
    """

    images: Sequence[bytes | Path]
    targets: Sequence[int]
    where: Callable[[int], str]


class EncodedImages(LabelledData):
    """Images that are decoded when they are first used, and mapped from a file afterwards.

    They are turned as their EXIF orientation says, as `datasets` does, and transparent pixels are laid over white. The
    cache lies in ABLAB_CACHE, or ~/.cache/ablab; its key is the content of the files, and all that decides the pixels.

    Args:
        image_size: pixels of each side; the shorter side is scaled to it and the middle cut out. None takes images as
            they are, and they must all have one size.
        in_channels: 3 for colour, 1 for grey.
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
        self.notes: Counter[str] = Counter()  # on images whose pixels are a matter of choice

    def key(self, *parts: str | bytes | int | Path) -> str:
        """The name in the cache of the images that are decoded from these parts."""
        from PIL import features

        codecs = (f"{name} {features.version(name)}" for name in CODECS)
        return content_key(DECODER, metadata.version("pillow"), *codecs, str(self.image_size), self.in_channels, *parts)

    def decoded(self, key: str, read: Callable[[], tuple[Encoded, list[str]]]) -> tuple[Samples, list[str]]:
        """The samples of a split and the names of its classes.

        Args:
            key: names the content of the files and all that is done to them.
            read: gives the encoded images and the class names; called only if they are not in the cache.

        Raises:
            ValueError: an image that cannot be decoded or has another size, or no images at all.
        """

        def make(writer: Writer) -> None:
            encoded, class_names = read()
            writer.facts["class_names"] = class_names
            decode(encoded, writer, self.image_size, self.in_channels)

        stored: Stored = cached(key, make)
        self.notes = self.notes + Counter(stored.facts.get("notes", {}))
        images, targets, digests = (stored.tensors[name] for name in ("images", "targets", "digests"))
        return Samples(images, targets, content=stored.digest, digests=digests), stored.facts["class_names"]

    def unusual(self) -> list[str]:
        return [*super().unusual(), *(f"images {note} ({count:,})" for note, count in sorted(self.notes.items()))]

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": self.in_channels, "num_classes": len(self.class_names)}


def decode(encoded: Encoded, writer: Writer, image_size: int | None, in_channels: int) -> None:
    """Decode all images of a split, on all cores, into the arrays `images`, `targets` and `digests`."""
    num = len(encoded.images)
    if not num:
        raise ValueError("there are no images in it")
    size = load_image(encoded, 0, image_size, in_channels).shape[1:]
    images = writer.array("images", (num, in_channels, *size), "uint8")
    digests = writer.array("digests", (num,), "int64", derived=True)
    notes: list[str] = []  # threads may append to a list at once

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
    """Decode an image `(C, H, W)` of bytes.

    Args:
        encoded, i: the images, and the number of one of them.
        image_size, in_channels: see `EncodedImages`.
        notes: see `open_image`.

    Raises:
        ValueError: see `open_image`.
    """
    image = open_image(encoded.images[i], lambda: encoded.where(i), in_channels, notes)
    return as_tensor(image if image_size is None else scaled(image, image_size))


def open_image(
    source: bytes | Path, where: Callable[[], str], in_channels: int, notes: list[str] | None = None
) -> Image.Image:
    """Decode an image into the mode of so many channels.

    Args:
        source: its bytes, or its file.
        where: says where the image is to be found, for an error.
        in_channels: see `EncodedImages`.
        notes: gets TRANSPARENT and ANIMATED if they are true of the image.

    Raises:
        ValueError: the image cannot be decoded, or has more than 8 bits a channel.
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
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise ValueError(f"{where()}: it cannot be decoded ({error}); replace it, or leave it out") from error
    if mode not in EIGHT_BITS:
        raise ValueError(f"{where()}: it has more than 8 bits a channel (mode {mode}); convert it first")
    if notes is not None:
        notes += found
    return image


def as_tensor(image: Image.Image) -> Tensor:
    """The pixels of an image `(C, H, W)`."""
    import numpy as np

    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def scaled(image: Image.Image, size: int, resample: Image.Resampling | None = None) -> Image.Image:
    """The middle of an image whose shorter side was brought to `size`, by bicubic interpolation unless told."""
    from PIL import Image

    resample = Image.Resampling.BICUBIC if resample is None else resample
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), resample)
    return image.crop((left, top, left + size, top + size))
