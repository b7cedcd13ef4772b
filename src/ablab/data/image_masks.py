"""Folders of images with segmentation masks."""

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
from ablab.data.cache import EntryWriter, get_or_create
from ablab.data.encoded_images import EncodedImages, open_image, resize_and_crop, to_tensor
from ablab.data.image_folder import PARTS, format_counts, scan
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, OfficialSplits, join_names
from ablab.data.masks import Masks
from ablab.status import with_progress

LAYOUTS = (
    "the layouts are root/images/… with root/masks/…, and root/train/images/… with root/train/masks/…, "
    "root/val/… and root/test/…"
)
NEEDED = "a mask is a PNG, palette or gray with 8 bits, whose pixel values are class numbers"


class Pair(NamedTuple):
    """The files of an image and its mask."""

    image: Path
    mask: Path


class ImageMasks(Masks, EncodedImages):
    """Folders `root/images/x.jpg` and `root/masks/x.png`, or `root/train/images/…`, `root/val/…`, `root/test/…`.

    A mask has the name of its image, with the suffix .png. Its pixel values are class indices, and 255 for ignored
    pixels. Missing test and validation splits are held out of the training split.

    Args:
        root: the folder.
        class_names: names of the classes, by class index; None uses the indices as names.
        test_fraction: fraction held out for testing if there is no test folder; always the same images. None is 0.2.
        image_size: side length in pixels: resizes the shorter side, bilinearly for images and by nearest neighbor for
            masks, then center-crops. None keeps the images, which must all have the same size.
        settings: see `Masks`, `EncodedImages`, `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, in_channels, H, W)`, targets `(N, H, W)`

    Raises:
        ValueError: the folder does not exist, an image or a mask has no counterpart or a different size, a mask is not
            an 8-bit index image or has an unknown class index, or a file cannot be decoded.
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

    def load(self) -> OfficialSplits:
        if not self.root.is_dir():
            what = "it is a file" if self.root.is_file() else "there is no such folder"
            raise ValueError(f"root={self.root}: {what}; give one with the folders images and masks")
        left_out: Counter[str] = Counter()
        folders = find_parts(self.root, left_out)
        pairs = {part: find_pairs(folder, left_out) for part, folder in folders.items()}
        decoded = {part: self.decode_pairs(own) for part, own in pairs.items()}
        present = {part: occurring.numpy() for part, (_, occurring) in decoded.items()}
        self.class_names = self.find_class_names(np.concatenate([*present.values()]).any(0))
        for part, own in pairs.items():
            self.check_numbers(own, present[part])
        parts = {part: samples for part, (samples, _) in decoded.items()}
        if "test" not in parts:
            fraction = TEST_FRACTION if self.test_fraction is None else self.test_fraction
            rest, test = self.split_holdout(parts["train"], fraction, TEST_SEED, "test_fraction")
            parts |= {"train": parts["train"].part(rest), "test": parts["train"].part(test)}
            if folders["train"] != self.root:
                self.remarks += (f"no test folder, so {fraction:.0%} of {folders['train'].name} is held out to test",)
        elif self.test_fraction is not None:
            self.remarks += (f"tested on {folders['test'].name}, test_fraction is not used",)
        if left_out:
            self.remarks += (f"left out: {format_counts(left_out)}",)
        return OfficialSplits(**parts)

    def decode_pairs(self, pairs: list[Pair]) -> tuple[Samples, Tensor]:
        """Return the samples of a split, and which of the 256 values occur in each mask `(N, 256)`."""
        files = [file for pair in pairs for file in pair]
        try:
            key = self.cache_key("image_masks", *(file.name for file in files), *files)
        except OSError as error:
            raise ValueError(
                f"{error.filename}: it cannot be read ({error.strerror}); fix its permissions, or leave it out"
            ) from error
        stored = get_or_create(key, lambda writer: decode(pairs, writer, self.image_size, self.in_channels))
        self.notes = self.notes + Counter(stored.facts.get("notes", {}))
        images, masks, digests = (stored.tensors[name] for name in ("images", "masks", "digests"))
        return Samples(images, masks, content=stored.digest, digests=digests), stored.tensors["present"]

    def find_class_names(self, occurring: NDArray[Any]) -> list[str]:
        """Return the class names; by default the class indices, which must have no gaps."""
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
                f"root={self.root}: the masks have class numbers up to {numbers[-1]}, and none has {join_names(gaps)}; "
                "number the classes from 0 without gaps, or give data.class_names"
            )
        return [str(number) for number in numbers]

    def check_numbers(self, pairs: list[Pair], present: NDArray[Any]) -> None:
        """Check that all class indices in the masks have a class name."""
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
    """Return the folders of the splits; a root with images and masks is the training split.

    Raises:
        ValueError: the folder has neither layout, two folders of a split, or no training split.
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
    """Return the images of a split with their masks, sorted by name.

    Raises:
        ValueError: a folder is missing, there are no images, or an image or a mask has no counterpart.
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
        others = f" that Pillow here can decode (but {format_counts(left_out)})" if left_out else ""
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


def decode(pairs: list[Pair], writer: EntryWriter, image_size: int | None, in_channels: int) -> None:
    """Decode all pairs in parallel into the arrays `images`, `masks`, `digests` and `present` of a cache entry."""
    size = load_pair(pairs[0], image_size, in_channels)[1].shape
    num = len(pairs)
    images = writer.array("images", (num, in_channels, *size), "uint8")
    masks = writer.array("masks", (num, *size), "uint8")
    digests = writer.array("digests", (num,), "int64", derived=True)
    present = writer.array("present", (num, IGNORED_PIXEL + 1), "uint8", derived=True)
    notes: list[str] = []  # list.append is thread-safe

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
    """Decode an image `(C, H, W)` and its mask `(H, W)`, both uint8.

    Raises:
        ValueError: a file cannot be decoded, the mask is not an 8-bit index image, or the sizes differ.
    """
    from PIL import Image

    image = open_image(pair.image, lambda: str(pair.image), in_channels, notes)
    try:
        with Image.open(pair.mask) as opened:
            opened.load()
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions
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
        image = resize_and_crop(image, image_size, Image.Resampling.BILINEAR)
        mask = resize_and_crop(mask, image_size, Image.Resampling.NEAREST)
    # np.array of a palette image gives the palette indices
    return to_tensor(image), torch.from_numpy(np.array(mask, dtype=np.uint8))
