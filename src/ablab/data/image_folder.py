"""A folder that has a folder of images for each class."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from ablab.data.batch import Samples
from ablab.data.encoded_images import Encoded, EncodedImages
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, Official, enumerated, hold_out

# The usual names of parts, in lower case.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
UNCLEAR = {"eval", "evaluation"}  # a test part for some, a validation part for others
LAYOUTS = "the layouts are root/train/CLASS/… with root/test/CLASS/…, and root/CLASS/…"
NOT_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}  # though Pillow knows their suffixes
# Files and folders that come with any folder, in lower case: nobody takes them for images.
ORDINARY_NAMES = {"desktop.ini", "licence", "license", "readme", "thumbs.db"}
ORDINARY_SUFFIXES = {".md", ".txt"}


class ImageFolder(EncodedImages):
    """`root/train/<class>/*.png`, `root/test/…` and `root/val/…`, or just `root/<class>/*.png`.

    The parts may have any of their usual names (Training, valid, Testing, …). A missing test part is held out of the
    training part, and so is a missing validation part. Links to folders are followed.

    Args:
        root: the folder.
        test_fraction: held out to test where there is no test folder, always the same images; None is 0.2.
        settings: see `EncodedImages`, `LabelledData` and `DataModule`.

    Raises:
        ValueError: no such folder, folders that are neither parts nor classes, a class without training images, test
            images of a class that training lacks, a link to nothing, or an image that cannot be decoded.
    """

    def __init__(self, *, root: str, test_fraction: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.test_fraction = test_fraction

    def load(self) -> Official:
        if not self.root.is_dir():
            what = "it is a file" if self.root.is_file() else "there is no such folder"
            raise ValueError(f"root={self.root}: {what}; give one with a folder for each class")
        left_out: Counter[str] = Counter()
        folders = find_parts(self.root, left_out)
        if "test" in folders and self.test_fraction is not None:
            self.remarks += (f"tested on {folders['test'].name}, test_fraction is not used",)
        listings = {part: Listing(folder, left_out) for part, folder in folders.items()}
        self.class_names = list(listings["train"].classes)
        for part, listing in listings.items():
            self.check_classes(listing, of_training=part == "train")
        parts = {part: self.samples(listing) for part, listing in listings.items()}
        if "test" not in parts:
            fraction = TEST_FRACTION if self.test_fraction is None else self.test_fraction
            rest, test = hold_out(parts["train"], fraction, TEST_SEED, "test_fraction")
            parts |= {"train": parts["train"].part(rest), "test": parts["train"].part(test)}
            if folders["train"] != self.root:
                self.remarks += (f"no test folder, so {fraction:.0%} of {folders['train'].name} is held out to test",)
        if nested := sum(listing.num_nested for listing in listings.values()):
            self.remarks += (f"{nested:,} images are in subfolders of their class",)
        if left_out:
            self.remarks += (f"left out: {show(left_out)}",)
        return Official(**parts)

    def check_classes(self, listing: Listing, *, of_training: bool) -> None:
        """Refuse a part without images, one whose classes training lacks, and a class without training images."""
        if unknown := sorted(listing.classes.keys() - set(self.class_names)):
            raise ValueError(
                f"{listing.folder}: the training part has no class {enumerated(unknown)}; give training images of it, "
                "or leave it out"
            )
        empty = [name for name, files in listing.classes.items() if not files]
        if empty and (of_training or len(empty) == len(listing.classes)):
            others = f" that Pillow here can decode (but {show(listing.left_out)})" if listing.left_out else ""
            raise ValueError(
                f"{listing.folder / empty[0]}: there is no image in it{others}; a class needs some, or no folder"
            )
        same = Counter(name.casefold() for name in self.class_names)
        if of_training and (alike := [name for name in self.class_names if same[name.casefold()] > 1]):
            self.remarks += (f"classes that differ only in case: {enumerated(alike)}",)

    def samples(self, listing: Listing) -> Samples:
        """Return the decoded images of a part."""
        files = [file for own in listing.classes.values() for file in own]
        numbers = {name: number for number, name in enumerate(self.class_names)}
        targets = [numbers[name] for name, own in listing.classes.items() for _ in own]
        names = [str(file.relative_to(listing.folder)) for file in files]
        try:
            key = self.key("image_folder", len(self.class_names), *self.class_names, *names, *files)
        except OSError as error:
            raise ValueError(
                f"{error.filename}: it cannot be read ({error.strerror}); fix its permissions, or leave it out"
            ) from error
        samples, _ = self.decoded(key, lambda: (Encoded(files, targets, lambda i: str(files[i])), self.class_names))
        return samples


def images_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the images in a folder and its subfolders in the order of their paths; links to folders are not followed.

    Args:
        folder: to be read.
        left_out: counts the files that are not used.

    Raises:
        ValueError: a folder that cannot be read, or a link to nothing.
    """
    folders, images = scan(folder, left_out)
    own = [inner for inner in folders if not inner.is_symlink()]
    left_out["links to folders"] += len(folders) - len(own)
    return sorted(images + [file for inner in own for file in images_below(inner, left_out)])


class Listing:
    """The images of a part by their classes.

    A folder is read once, whatever links lead to it.

    Args:
        folder: has a folder of images for each class.
        left_out: counts the files and folders that are not used.

    Attributes:
        classes: the files of each class in the order of their names; a folder may have none.
        num_nested: images that are in subfolders of their class.

    Raises:
        ValueError: a folder that cannot be read, a link to nothing, or folders that are not classes.
    """

    def __init__(self, folder: Path, left_out: Counter[str]) -> None:
        self.folder = folder
        self.left_out: Counter[str] = Counter()
        self.tree = folder.resolve()
        self.visited = {self.tree}
        self.num_nested = 0
        folders, images = scan(folder, self.left_out)
        if not folders:
            instead = f", but {len(images):,} images" if images else ""
            raise ValueError(f"root={folder}: there are no folders in it{instead}; it needs one for each class")
        if images:
            self.left_out["images outside class folders"] += len(images)
        found: dict[str, list[Path]] = {}
        containers: dict[
            str, set[str]
        ] = {}  # classes that have all their images in subfolders, with the names of these
        for path in [folder for folder in folders if self.enter(folder)]:  # before a link in one takes another
            name = unicodedata.normalize("NFC", path.name)  # macOS writes é as two characters
            if name in found:
                raise ValueError(f"{path}: another folder has the same name in other bytes of Unicode; merge the two")
            if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
                raise ValueError(
                    f"{str(path)!a}: its name has control characters, or bytes that are not UTF-8; rename it"
                )
            found[name] = sorted(self.walk(path))
            places = [file.relative_to(path).parts for file in found[name]]
            nested = [parts[0] for parts in places if len(parts) > 1]
            self.num_nested += len(nested)
            if nested and len(nested) == len(places):
                containers[name] = set(nested)
        self.classes = dict(sorted(found.items()))
        self.check_layout(containers)
        left_out.update(self.left_out)

    def check_layout(self, containers: dict[str, set[str]]) -> None:
        """Refuse folders that are not classes by their names or by the folders in them."""
        names = sorted(self.classes)
        if len(names) == 1 and containers:
            inside = enumerated(sorted(containers[names[0]]))
            raise ValueError(
                f"root={self.folder}: its only folder is {names[0]}, which has folders of its own ({inside}); move "
                f"these up, or give root={self.folder / names[0]}; {LAYOUTS}"
            )
        if len(set().union(*map(part_words, names))) > 1 and all(map(part_words, names)):
            named = enumerated([name for name in names if part_words(name)])
            raise ValueError(f"root={self.folder}: {named} are parts by their names, and not classes; {LAYOUTS}")
        owners: dict[str, list[str]] = {}
        for name, subfolders in containers.items():
            for subfolder in sorted({PARTS.get(each.lower(), each.lower()) for each in subfolders}):
                owners.setdefault(subfolder, []).append(name)
        for subfolder, several in owners.items():
            # one name below each class tells nothing apart: class/images/…, as Tiny ImageNet has it
            if len(several) > 1 and (len(owners) > 1 or subfolder in PARTS.values()):
                raise ValueError(
                    f"root={self.folder}: {' and '.join(several[:2])} both have a folder {subfolder}, and no images "
                    f"beside it, so it is not clear which are the classes; {LAYOUTS}"
                )

    def walk(self, folder: Path) -> list[Path]:
        """Return the images in a folder and in its subfolders."""
        folders, images = scan(folder, self.left_out)
        return images + [file for inner in filter(self.enter, folders) for file in self.walk(inner)]

    def enter(self, folder: Path) -> bool:
        """Return whether a folder is to be read: not if it was, or if it is a link to a folder that is read anyway."""
        place = folder.resolve()
        seen = place in self.visited
        if folder.is_symlink():
            if place.is_relative_to(self.tree):
                seen |= not any(name.startswith(".") for name in place.relative_to(self.tree).parts)
            seen |= any(inner.is_relative_to(place) for inner in (self.tree, folder.parent.resolve()))
        if seen:
            self.left_out["links to folders that are read anyway"] += 1
            return False
        self.visited.add(place)
        return True


def find_parts(root: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Return the folders of the parts by the parts' names; a root without parts is all training.

    Raises:
        ValueError: two folders of a part, no training part, or parts without class folders.
    """
    inside: Counter[str] = Counter()
    folders, images = scan(root, inside)
    known = [folder for folder in folders if folder.name.lower() in PARTS]
    others = [folder for folder in folders if folder not in known]
    if not any(scan(folder, Counter())[0] for folder in known):  # a class can be called train: bus, car, train
        if known and not others:
            raise ValueError(f"root={root}: there are no class folders in {known[0].name}; {LAYOUTS}")
        return {"train": root}
    parts: dict[str, Path] = {}
    for folder in known:
        part = PARTS[folder.name.lower()]
        if part in parts:
            raise ValueError(
                f"root={root}: {parts[part].name} and {folder.name} are both names of the {part} part; leave one out"
            )
        parts[part] = folder
    if "train" not in parts:
        raise ValueError(f"root={root}: it has a folder {known[0].name} but no folder train; {LAYOUTS}")
    for folder in others:
        if part_words(folder.name):
            raise ValueError(
                f"root={root}: {folder.name} beside {parts['train'].name} may be a part; name it train, val or test, "
                "or move it elsewhere"
            )
        inside[f"entries of folder {folder.name}"] += len(os.listdir(folder))
    if images:
        inside["images outside class folders"] += len(images)
    left_out.update(inside)
    return {part: parts[part] for part in ("train", "test", "val") if part in parts}


def part_words(name: str) -> set[str]:
    """Return the parts that a folder's name speaks of: seg_train and TrainSet of train."""
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    return {PARTS.get(word, word) for word in words if word in PARTS or word in UNCLEAR}


def scan(folder: Path, left_out: Counter[str]) -> tuple[list[Path], list[Path]]:
    """Return the folders and the images directly in a folder, by their names.

    Args:
        folder: to be read.
        left_out: counts everything else, but for ordinary files.

    Raises:
        ValueError: the folder cannot be read, or has links to nothing.
    """
    try:
        with os.scandir(folder) as opened:
            entries = sorted(opened, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"{folder}: it cannot be read ({error.strerror}); fix its permissions, or leave it out"
        ) from error
    folders: list[Path] = []
    images: list[Path] = []
    broken: list[str] = []
    for entry in entries:
        path = Path(entry.path)
        suffix, is_link = path.suffix.lower(), entry.is_symlink()
        if entry.name.startswith("."):
            if hidden := count_hidden(path):
                left_out["hidden images"] += hidden
        elif entry.name == "__MACOSX":
            continue
        elif os.path.isdir(path) if is_link else entry.is_dir():
            folders.append(path)
        elif is_link and not os.path.exists(path) and (suffix in image_suffixes() or not suffix):
            broken.append(entry.name)
        elif suffix in image_suffixes() and (os.path.isfile(path) if is_link else entry.is_file()):
            images.append(path)
        elif not {entry.name.lower(), path.stem.lower()} & ORDINARY_NAMES and suffix not in ORDINARY_SUFFIXES:
            left_out[f"{suffix or 'other'} files"] += 1
    if broken:
        more = f", and so do {len(broken) - 1} more links in this folder" if len(broken) > 1 else ""
        raise ValueError(
            f"{folder / broken[0]}: the link leads to nothing{more}; restore the files, or remove the links"
        )
    return folders, images


def count_hidden(path: Path) -> int:
    """Count the image that a hidden file is, or the images directly in a hidden folder."""
    if path.name.startswith("._"):  # macOS's notes on another file
        return 0
    try:
        names = os.listdir(path) if os.path.isdir(path) else [path.name]
    except OSError:
        return 0
    return sum(Path(name).suffix.lower() in image_suffixes() for name in names)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of all images that Pillow can decode here, in lower case."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    return frozenset(name for name, kind in suffixes.items() if kind in Image.OPEN and kind not in NOT_IMAGES)


def show(left_out: Counter[str]) -> str:
    return ", ".join(f"{what} ({count:,})" for what, count in sorted(left_out.items()))
