"""A folder that has a folder of images for each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ablab.data.batch import Samples
from ablab.data.encoded_images import Encoded, EncodedImages
from ablab.data.labelled import TEST_SEED, Official, hold_out

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFolder(EncodedImages):
    """`root/train/<class>/*.png`, `root/test/…` and, if there is one, `root/val/…`; or just `root/<class>/*.png`.

    Args:
        root: the folder.
        test_fraction: held out for the test where there is no folder `test`; always the same images.
        settings: see `EncodedImages`, `LabelledData` and `DataModule`.

    Raises:
        ValueError: no such folder, a class without images, parts with different classes, or an image that cannot be
            decoded.
    """

    def __init__(self, *, root: str, test_fraction: float = 0.2, **settings: Any) -> None:
        super().__init__(**settings)
        self.root = Path(root)
        self.test_fraction = test_fraction

    def load(self) -> Official:
        if not self.root.is_dir():
            raise ValueError(f"root={self.root}: there is no such folder; give one with a folder for each class")
        if not (self.root / "train").is_dir():
            everything, self.class_names = self.split(self.root)
            rest, test = hold_out(everything, self.test_fraction, TEST_SEED, "test_fraction")
            return Official(everything.part(rest), everything.part(test))
        if not (self.root / "test").is_dir():
            raise ValueError(f"root={self.root}: it has a folder train but no folder test; give both, or only classes")
        train, self.class_names = self.split(self.root / "train")
        parts: dict[str, Samples] = {}
        for name in ("test", "val"):
            if (self.root / name).is_dir():
                parts[name], class_names = self.split(self.root / name)
                if strange := sorted(set(class_names) ^ set(self.class_names)):
                    raise ValueError(
                        f"root={self.root}: train and {name} have different classes ({', '.join(strange)} in one only)"
                    )
        return Official(train, **parts)

    def split(self, folder: Path) -> tuple[Samples, list[str]]:
        files, targets, class_names = listing(folder)
        names = [str(file.relative_to(folder)) for file in files]
        key = self.key("image_folder", *names, *files)
        return self.decoded(key, lambda: (Encoded(files, targets, lambda i: str(files[i])), class_names))


def listing(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """The image files of all class folders in the order of their names, their classes, and the classes' names."""
    class_folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_folders:
        raise ValueError(f"root={folder}: there are no folders in it; it needs one for each class")
    files: list[Path] = []
    targets: list[int] = []
    for number, class_folder in enumerate(class_folders):
        own = sorted(file for file in class_folder.rglob("*") if is_image(file.relative_to(folder), file))
        if not own:
            raise ValueError(f"{class_folder}: there is no image in it; a class needs some, or no folder")
        files += own
        targets += [number] * len(own)
    return files, targets, [path.name for path in class_folders]


def is_image(path: Path, file: Path) -> bool:
    """Whether a file is an image by its name, and neither hidden nor in a hidden folder."""
    hidden = any(part.startswith(".") for part in path.parts)
    return file.suffix.lower() in SUFFIXES and not hidden and file.is_file()
