"""Image folders with one subfolder per class."""

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
from ablab.data.labelled import TEST_FRACTION, TEST_SEED, OfficialSplits, hold_out, join_names

# Common names of splits, in lower case.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
AMBIGUOUS = {"eval", "evaluation"}  # ambiguous: validation or test split
LAYOUTS = "the layouts are root/train/CLASS/… with root/test/CLASS/…, and root/CLASS/…"
NOT_IMAGES = {
    "BUFR",
    "EPS",
    "FITS",
    "GRIB",
    "HDF5",
    "IPTC",
    "MPEG",
    "PDF",
    "WMF",
}  # not treated as images, though Pillow registers their suffixes
# Common files that are skipped without a remark, in lower case.
ORDINARY_NAMES = {"desktop.ini", "licence", "license", "readme", "thumbs.db"}
ORDINARY_SUFFIXES = {".md", ".txt"}


class ImageFolder(EncodedImages):
    """An image folder: `root/train/<class>/*.png`, `root/test/…` and `root/val/…`, or just `root/<class>/*.png`.

    Split folders may have other common names (Training, valid, Testing, …). Missing test and validation splits are held
    out of the training split. Links to folders are followed.

    Args:
        root: the folder.
        test_fraction: fraction held out for testing if there is no test folder; always the same images. None is 0.2.
        settings: see `EncodedImages`, `LabelledData` and `DataModule`.

    Raises:
        ValueError: the folder does not exist, its subfolders are neither splits nor classes, a class has no training
            images, a link is broken, or an image cannot be decoded.
    """

    def __init__(self, *, root: str, test_fraction: float | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.test_fraction = test_fraction

    def load(self) -> OfficialSplits:
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
            self.remarks += (f"left out: {format_counts(left_out)}",)
        return OfficialSplits(**parts)

    def check_classes(self, listing: Listing, *, of_training: bool) -> None:
        """Check that a split has images, its classes are training classes, and these have training images."""
        if unknown := sorted(listing.classes.keys() - set(self.class_names)):
            raise ValueError(
                f"{listing.folder}: the training part has no class {join_names(unknown)}; give training images of it, "
                "or leave it out"
            )
        empty = [name for name, files in listing.classes.items() if not files]
        if empty and (of_training or len(empty) == len(listing.classes)):
            others = f" that Pillow here can decode (but {format_counts(listing.left_out)})" if listing.left_out else ""
            raise ValueError(
                f"{listing.folder / empty[0]}: there is no image in it{others}; a class needs some, or no folder"
            )
        same = Counter(name.casefold() for name in self.class_names)
        if of_training and (alike := [name for name in self.class_names if same[name.casefold()] > 1]):
            self.remarks += (f"classes that differ only in case: {join_names(alike)}",)

    def samples(self, listing: Listing) -> Samples:
        """Return the decoded images of a split."""
        files = [file for own in listing.classes.values() for file in own]
        numbers = {name: number for number, name in enumerate(self.class_names)}
        targets = [numbers[name] for name, own in listing.classes.items() for _ in own]
        names = [str(file.relative_to(listing.folder)) for file in files]
        try:
            key = self.cache_key("image_folder", len(self.class_names), *self.class_names, *names, *files)
        except OSError as error:
            raise ValueError(
                f"{error.filename}: it cannot be read ({error.strerror}); fix its permissions, or leave it out"
            ) from error
        samples, _ = self.decode_split(
            key, lambda: (Encoded(files, targets, lambda i: str(files[i])), self.class_names)
        )
        return samples


def images_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the images below a folder, sorted by path; links to folders are not followed.

    Args:
        folder: the folder.
        left_out: counter of skipped files, updated in place.

    Raises:
        ValueError: a folder cannot be read, or a link is broken.
    """
    folders, images = scan(folder, left_out)
    own = [inner for inner in folders if not inner.is_symlink()]
    left_out["links to folders"] += len(folders) - len(own)
    return sorted(images + [file for inner in own for file in images_below(inner, left_out)])


class Listing:
    """The images of a split, by class. Each folder is read once, even if several links lead to it.

    Args:
        folder: a folder with one subfolder of images per class.
        left_out: counter of skipped files and folders, updated in place.

    Attributes:
        classes: the image files of each class, sorted by name; may be empty.
        num_nested: number of images in subfolders of class folders.

    Raises:
        ValueError: a folder cannot be read, a link is broken, or the subfolders are not classes.
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
        # classes with all their images in subfolders, and the names of these
        containers: dict[str, set[str]] = {}
        # marks all class folders before links are followed
        for path in [folder for folder in folders if self.visit_once(folder)]:
            name = unicodedata.normalize("NFC", path.name)  # macOS writes é as two characters
            if name in found:
                raise ValueError(f"{path}: another folder has the same name in other bytes of Unicode; merge the two")
            if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
                raise ValueError(
                    f"{str(path)!a}: its name has control characters, or bytes that are not UTF-8; rename it"
                )
            found[name] = sorted(self.find_images(path))
            places = [file.relative_to(path).parts for file in found[name]]
            nested = [parts[0] for parts in places if len(parts) > 1]
            self.num_nested += len(nested)
            if nested and len(nested) == len(places):
                containers[name] = set(nested)
        self.classes = dict(sorted(found.items()))
        self.check_layout(containers)
        left_out.update(self.left_out)

    def check_layout(self, containers: dict[str, set[str]]) -> None:
        """Check that the subfolders are classes, by their names and by the folders in them."""
        names = sorted(self.classes)
        if len(names) == 1 and containers:
            inside = join_names(sorted(containers[names[0]]))
            raise ValueError(
                f"root={self.folder}: its only folder is {names[0]}, which has folders of its own ({inside}); move "
                f"these up, or give root={self.folder / names[0]}; {LAYOUTS}"
            )
        if len(set().union(*map(splits_named_in, names))) > 1 and all(map(splits_named_in, names)):
            named = join_names([name for name in names if splits_named_in(name)])
            raise ValueError(f"root={self.folder}: {named} are parts by their names, and not classes; {LAYOUTS}")
        owners: dict[str, list[str]] = {}
        for name, subfolders in containers.items():
            for subfolder in sorted({PARTS.get(each.lower(), each.lower()) for each in subfolders}):
                owners.setdefault(subfolder, []).append(name)
        for subfolder, several in owners.items():
            # the same single subfolder in every class is fine: class/images/…, as in Tiny ImageNet
            if len(several) > 1 and (len(owners) > 1 or subfolder in PARTS.values()):
                raise ValueError(
                    f"root={self.folder}: {' and '.join(several[:2])} both have a folder {subfolder}, and no images "
                    f"beside it, so it is not clear which are the classes; {LAYOUTS}"
                )

    def find_images(self, folder: Path) -> list[Path]:
        """Return the images in a folder and its subfolders."""
        folders, images = scan(folder, self.left_out)
        return images + [file for inner in filter(self.visit_once, folders) for file in self.find_images(inner)]

    def visit_once(self, folder: Path) -> bool:
        """Return whether to read a folder, and mark it as visited; not if it is also read by another path."""
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
    """Return the folders of the splits; without split folders, the root is the training split.

    Raises:
        ValueError: two folders have names of the same split, there is no training split, or no class folders.
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
        if splits_named_in(folder.name):
            raise ValueError(
                f"root={root}: {folder.name} beside {parts['train'].name} may be a part; name it train, val or test, "
                "or move it elsewhere"
            )
        inside[f"entries of folder {folder.name}"] += len(os.listdir(folder))
    if images:
        inside["images outside class folders"] += len(images)
    left_out.update(inside)
    return {part: parts[part] for part in ("train", "test", "val") if part in parts}


def splits_named_in(name: str) -> set[str]:
    """Return the splits that occur as words in a folder name, for example train in seg_train and TrainSet."""
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]
    return {PARTS.get(word, word) for word in words if word in PARTS or word in AMBIGUOUS}


def scan(folder: Path, left_out: Counter[str]) -> tuple[list[Path], list[Path]]:
    """Return the folders and the images directly in a folder, sorted by name.

    Args:
        folder: the folder.
        left_out: counter of other files, updated in place; does not count common files such as README.

    Raises:
        ValueError: the folder cannot be read, or has broken links.
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
    """Count the images in a hidden folder; 1 for a hidden image file."""
    if path.name.startswith("._"):  # metadata file of macOS
        return 0
    try:
        names = os.listdir(path) if os.path.isdir(path) else [path.name]
    except OSError:
        return 0
    return sum(Path(name).suffix.lower() in image_suffixes() for name in names)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of all image formats that the installed Pillow can decode."""
    from PIL import Image

    suffixes = Image.registered_extensions()
    return frozenset(name for name, kind in suffixes.items() if kind in Image.OPEN and kind not in NOT_IMAGES)


def format_counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{what} ({count:,})" for what, count in sorted(left_out.items()))
