"""A folder of images, and a mask for each of them."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablab.data.batch import IGNORED_PIXEL, Samples, sample_digest
from ablab.data.cache import Writer, cached
from ablab.data.encoded_images import EncodedImages, as_tensor, open_image, scaled
from ablab.data.image_folder import PARTS, scan, show
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, Official, enumerated
from ablab.data.masks import Masks
from ablab.status import with_progress

LAYOUTS = (
    "the layouts are root/images/… with root/masks/…, and root/train/images/… with root/train/masks/…, "
    "root/val/… and root/test/…"
)
NEEDED = "a mask is a PNG, palette or gray with 8 bits, whose pixel values are class numbers"


class Pair(NamedTuple):
    """The files of an image and of its mask."""

    image: Path
    mask: Path


class ImageMasks(Masks, EncodedImages):
    """`root/images/x.jpg` with `root/masks/x.png`, or `root/train/images/…`, `root/val/…` and `root/test/…`.

    A mask has the name of its image, with the suffix .png; its pixel values are class numbers, and 255 is a pixel that
    does not count. A missing test part is held out of the training part, and so is a missing validation part.

    Args:
        root: the folder.
        class_names: in the order of the class numbers; None names them by their numbers.
        test_fraction: held out to test where there is no test folder, always the same images; None is 0.2.
        image_size: pixels of each side; the shorter side is scaled to it and the middle cut out, images bilinearly,
            masks by their nearest pixels. None takes images as they are, and they must all have one size.
        settings: see `Masks`, `EncodedImages`, `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, in_channels, H, W)`, targets `(N, H, W)`

    Raises:
        ValueError: no such folder, an image without a mask or a mask without an image, another size than the image's, a
            mask of colours, an unknown class number, or a file that cannot be decoded.
    """

    def __init__(
        self,
        *,
        root: str,
        class_names: list[str] | None = None,
        test_fraction: float | None = None,
        image_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(image_size=image_size, **settings)
        self.root = Path(root)
        self.given_names = class_names
        self.test_fraction = test_fraction

    def load(self) -> Official:
        if not self.root.is_dir():
            what = "it is a file" if self.root.is_file() else "there is no such folder"
            raise ValueError(f"root={self.root}: {what}; give one with the folders images and masks")
        left_out: Counter[str] = Counter()
        folders = find_parts(self.root, left_out)
        pairs = {part: find_pairs(folder, left_out) for part, folder in folders.items()}
        decoded = {part: self.decoded_pairs(own) for part, own in pairs.items()}
        present = {part: occurring.numpy() for part, (_, occurring) in decoded.items()}
        self.class_names = self.names_of(np.concatenate([*present.values()]).any(0))
        for part, own in pairs.items():
            self.check_numbers(own, present[part])
        parts = {part: samples for part, (samples, _) in decoded.items()}
        if "test" not in parts:
            fraction = TEST_FRACTION if self.test_fraction is None else self.test_fraction
            rest, test = self.held_out(parts["train"], fraction, TEST_SEED, "test_fraction")
            parts |= {"train": parts["train"].part(rest), "test": parts["train"].part(test)}
            if folders["train"] != self.root:
                self.remarks += (f"no test folder, so {fraction:.0%} of {folders['train'].name} is held out to test",)
        elif self.test_fraction is not None:
            self.remarks += (f"tested on {folders['test'].name}, test_fraction is not used",)
        if left_out:
            self.remarks += (f"left out: {show(left_out)}",)
        return Official(**parts)

    def decoded_pairs(self, pairs: list[Pair]) -> tuple[Samples, Tensor]:
        """Return the samples of a part, and which of the 256 values occur in each mask `(N, 256)`."""
        files = [file for pair in pairs for file in pair]
        try:
            key = self.key("image_masks", *(file.name for file in files), *files)
        except OSError as error:
            raise ValueError(
                f"{error.filename}: it cannot be read ({error.strerror}); fix its permissions, or leave it out"
            ) from error
        stored = cached(key, lambda writer: decode(pairs, writer, self.image_size, self.in_channels))
        self.notes = self.notes + Counter(stored.facts.get("notes", {}))
        images, masks, digests = (stored.tensors[name] for name in ("images", "masks", "digests"))
        return Samples(images, masks, content=stored.digest, digests=digests), stored.tensors["present"]

    def names_of(self, occurring: NDArray[Any]) -> list[str]:
        """Return the names of the classes; without names given, the masks have each number from 0 to the largest."""
        if self.given_names is not None:
            return self.given_names
        numbers = occurring[:IGNORED_PIXEL].nonzero()[0].tolist()
        if len(numbers) < 2:
            raise ValueError(
                f"root={self.root}: the masks have the class numbers {numbers} alone, and {IGNORED_PIXEL} is a pixel "
                "that does not count; at least two classes are needed, for example 0 and 1"
            )
        if gaps := [str(number) for number in range(numbers[-1]) if number not in numbers]:
            raise ValueError(
                f"root={self.root}: the masks have class numbers up to {numbers[-1]}, and none has {enumerated(gaps)}; "
                "number the classes from 0 without gaps, or give data.class_names"
            )
        return [str(number) for number in numbers]

    def check_numbers(self, pairs: list[Pair], present: NDArray[Any]) -> None:
        """Refuse class numbers that no class has."""
        wrong = present.astype(bool)
        wrong[:, : len(self.class_names)] = False
        wrong[:, IGNORED_PIXEL] = False
        if wrong.any():
            row, number = np.argwhere(wrong)[0].tolist()
            raise ValueError(
                f"{pairs[row].mask}: it has the class number {number}, and data.class_names has "
                f"{len(self.class_names)} classes; use 0 to {len(self.class_names) - 1}, and {IGNORED_PIXEL} for "
                "pixels that do not count, or name more classes"
            )


def find_parts(root: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Return the folders of the parts by the parts' names; a root with images and masks is all training.

    Raises:
        ValueError: neither layout, two folders of a part, or no training part.
    """
    inside: Counter[str] = Counter()
    folders, images = scan(root, inside)
    names = {folder.name.lower() for folder in folders}
    if names & {"images", "masks"}:
        if beside := [folder.name for folder in folders if folder.name.lower() in PARTS]:
            raise ValueError(
                f"root={root}: it has the folder {beside[0]} beside images and masks; move these two into a folder "
                f"train, or {beside[0]} elsewhere; {LAYOUTS}"
            )
        left_out.update(inside)
        return {"train": root}
    parts: dict[str, Path] = {}
    for folder in folders:
        part = PARTS.get(folder.name.lower())
        if part is None:
            inside[f"entries of folder {folder.name}"] += len(os.listdir(folder))
        elif part in parts:
            raise ValueError(
                f"root={root}: {parts[part].name} and {folder.name} are both names of the {part} part; leave one out"
            )
        else:
            parts[part] = folder
    if "train" not in parts:
        raise ValueError(f"root={root}: it has no folders images and masks, and no folder train; {LAYOUTS}")
    if images:
        inside["images outside the folders images"] += len(images)
    left_out.update(inside)
    return parts


def find_pairs(folder: Path, left_out: Counter[str]) -> list[Pair]:
    """Return the images of a part with their masks, by their names.

    Raises:
        ValueError: a folder that is missing, no images, or an image or a mask without the other.
    """
    found: dict[str, dict[str, Path]] = {}
    subfolders = {path.name.lower(): path for path in scan(folder, Counter())[0]}
    for name in ("images", "masks"):
        if name not in subfolders:
            raise ValueError(f"root={folder}: there is no folder {name} in it; {LAYOUTS}")
        inner, files = scan(subfolders[name], left_out)
        for each in inner:
            left_out[f"entries of folder {name}/{each.name}"] += len(os.listdir(each))
        own = found[name] = {}
        for file in files:
            if (other := own.setdefault(file.stem, file)) != file:
                raise ValueError(f"{other}: {file.name} has the same name but for its suffix; leave one of them out")
    images, masks = found["images"], found["masks"]
    if not images:
        others = f" that Pillow here can decode (but {show(left_out)})" if left_out else ""
        raise ValueError(f"{subfolders['images']}: there are no images in it{others}; give some, each with a mask")
    for missing, owner, what, remedy in (
        (sorted(images.keys() - masks.keys()), images, "mask", f"add {subfolders['masks'].name}/NAME.png"),
        (sorted(masks.keys() - images.keys()), masks, "image", f"add it to {subfolders['images'].name}"),
    ):
        if missing:
            more = f", and {len(missing) - 1} more have none" if len(missing) > 1 else ""
            raise ValueError(
                f"{owner[missing[0]]}: there is no {what} of this name{more}; "
                f"{remedy.replace('NAME', missing[0])}, or leave the file out"
            )
    return [Pair(images[stem], masks[stem]) for stem in sorted(images)]


def decode(pairs: list[Pair], writer: Writer, image_size: int | None, in_channels: int) -> None:
    """Decode all pairs of a part, on all cores, into the arrays `images`, `masks`, `digests` and `present`."""
    size = load_pair(pairs[0], image_size, in_channels)[1].shape
    num = len(pairs)
    images = writer.array("images", (num, in_channels, *size), "uint8")
    masks = writer.array("masks", (num, *size), "uint8")
    digests = writer.array("digests", (num,), "int64", derived=True)
    present = writer.array("present", (num, IGNORED_PIXEL + 1), "uint8", derived=True)
    notes: list[str] = []  # threads may append to a list at once

    def fill(i: int) -> None:
        image, mask = load_pair(pairs[i], image_size, in_channels, notes)
        if mask.shape != size:
            raise ValueError(
                f"{pairs[i].image}: it has {mask.shape[0]}x{mask.shape[1]} pixels, and the first image "
                f"{size[0]}x{size[1]}; set data.image_size to bring all to one size"
            )
        images[i], masks[i] = image.numpy(), mask.numpy()
        digests[i] = sample_digest(images[i].tobytes())
        present[i, np.unique(masks[i])] = 1

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in with_progress(pool.map(fill, range(num), chunksize=256), num, "decoding images, once for all runs"):
            pass
    if notes:
        writer.facts["notes"] = Counter(notes)


def load_pair(
    pair: Pair, image_size: int | None, in_channels: int, notes: list[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Decode an image `(C, H, W)` and its mask `(H, W)`, both of bytes.

    Raises:
        ValueError: a file that cannot be decoded, a mask of colours, or two sizes.
    """
    from PIL import Image

    image = open_image(pair.image, lambda: str(pair.image), in_channels, notes)
    try:
        with Image.open(pair.mask) as opened:
            opened.load()
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise ValueError(f"{pair.mask}: it cannot be decoded ({error}); replace it, or leave it out") from error
    mask: Image.Image = opened
    if opened.format != "PNG" or mask.mode not in ("1", "L", "P"):
        raise ValueError(f"{pair.mask}: it is a {opened.format} of mode {mask.mode}; {NEEDED}; convert it")
    if mask.size != image.size:
        own, wanted = (f"{height}x{width}" for width, height in (mask.size, image.size))
        raise ValueError(
            f"{pair.mask}: the mask has {own} pixels and its image {wanted} (turned as its EXIF orientation says); "
            "bring both to one size"
        )
    if image_size is not None:
        image = scaled(image, image_size, Image.Resampling.BILINEAR)
        mask = scaled(mask, image_size, Image.Resampling.NEAREST)
    # palette images as indices into their palette
    return as_tensor(image), torch.from_numpy(np.array(mask, dtype=np.uint8))
