"""Folders of images: parts, classes, links and everything else that lies in them is recognized, reported or refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from ablab.data.image_folder import ImageFolder, image_suffixes
from ablab.data.reading import read_once, setup_data

CLASSES = ("cat", "dog", "emu")
Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write folders of images, each image another one."""
    written = 0

    def write(*folders: str, count: int = 6, suffix: str = "png", classes: tuple[str, ...] = CLASSES) -> Path:
        nonlocal written
        for folder in folders:
            for name in classes:
                (tmp_path / "root" / folder / name).mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    written += 1
                    pixels = np.random.default_rng(written).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / "root" / folder / name / f"{number}.{suffix}")
        return tmp_path / "root"

    return write


def read(root: Path, **settings: Any) -> ImageFolder:
    data = ImageFolder(root=str(root), batch_size=2, **{"val_fraction": 0.3, **settings})
    data.setup()
    return data


def sizes(data: ImageFolder) -> list[int]:
    assert data.splits is not None
    return [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)]


# Parts and classes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training", "Training"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_parts_have_their_usual_names_in_any_case(tree: Tree, train: str, test: str) -> None:
    data = read(tree(train, test))
    assert data.class_names == ["cat", "dog", "emu"]
    assert sizes(data) == [12, 6, 18]
    assert data.caveats() == []


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev"])
def test_a_given_validation_part_is_used_and_said_to_replace_val_fraction(tree: Tree, val: str) -> None:
    data = read(tree("train", val, "test"))
    assert sizes(data) == [18, 18, 18]
    assert data.caveats() == ["validated on the given validation part, val_fraction is not used"]


def test_the_samples_that_folds_leave_unused_are_counted(tree: Tree) -> None:
    data = read(tree("train", "val", "test"), folds=3, fold=1)
    assert sizes(data) == [12, 6, 18]
    assert data.caveats() == [
        "validated on fold 1 of 3",
        "the 18 samples of the given validation part are not used",
    ]


def test_a_missing_test_part_is_held_out_of_the_training_part(tree: Tree) -> None:
    data = read(tree("train", "val"))
    assert sizes(data) == [14, 18, 4]
    assert data.caveats()[0] == "no test folder, so 20% of train is held out to test"
    assert read(tree("train", "val"), test_fraction=0.5).caveats()[0].startswith("no test folder, so 50% of train")


def test_a_training_part_alone_gives_all_three_parts(tree: Tree) -> None:
    data = read(tree("Training"))
    assert sizes(data) == [9, 5, 4]
    assert data.caveats() == ["no test folder, so 20% of Training is held out to test"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "Training", "test"], "Training and train are both names of the train part; leave one out"),
        (["train", "val", "valid"], "val and valid are both names of the val part; leave one out"),
        (["test"], "it has a folder test but no folder train; the layouts are root/train/CLASS/"),
        (["val", "test"], "it has a folder test but no folder train"),
        (["train", "test_old"], "test_old beside train may be a part; name it train, val or test, or move it"),
        (["train", "eval"], "eval beside train may be a part"),
        (["part1", "part2"], "part1 and part2 both have a folder cat, and no images beside it, so it is not clear"),
        (["seg_train/seg_train", "seg_test/seg_test"], "seg_test, seg_train are parts by their names, and not classes"),
        (["trainSet", "testSet"], "testSet, trainSet are parts by their names"),
        (["dataset/train", "dataset/test"], r"its only folder is dataset, .* \(test, train\); move these up, or give"),
        (["dataset"], r"its only folder is dataset, .* \(cat, dog, emu\); move these up, or give root=.*root/dataset;"),
        (["train/images", "test/images"], "root/train: its only folder is images"),
    ],
)
def test_folders_that_may_be_parts_or_classes_are_refused(tree: Tree, folders: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tree(*folders))


def test_classes_that_have_the_parts_in_them_are_refused(tree: Tree) -> None:
    root = tree("", classes=("cat/train", "cat/test", "dog/Training", "dog/test"))
    with pytest.raises(ValueError, match="cat and dog both have a folder test, and no images beside it"):
        read(root)


def test_parts_without_class_folders_are_refused(tree: Tree) -> None:
    root = tree("", classes=("train", "test"))
    with pytest.raises(ValueError, match="there are no class folders in test"):
        read(root)
    tree("train")
    with pytest.raises(ValueError, match="root/test: there are no folders in it, but 6 images; it needs one for each"):
        read(root)


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("invalid", "valid"), ("1", "10", "2")])
def test_a_class_may_have_a_name_of_a_part(tree: Tree, classes: tuple[str, ...]) -> None:
    data = read(tree("", classes=classes))
    assert data.class_names == list(classes)
    assert data.caveats() == []


def test_other_folders_beside_the_parts_are_named(tree: Tree) -> None:
    assert read(tree("train", "test", "extra")).caveats() == ["left out: entries of folder extra (3)"]


def test_test_fraction_beside_a_test_part_is_said_not_to_be_used(tree: Tree) -> None:
    assert "tested on Test, test_fraction is not used" in read(tree("Train", "Test"), test_fraction=0.2).caveats()


def test_a_class_or_an_image_may_be_called_like_an_ordinary_file(tmp_path: Path) -> None:
    for name in ("license", "passport.txt"):
        for number in range(4):
            file = tmp_path / name / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4), (number, len(name), 0)).save(file)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "license" / "readme.png")
    (tmp_path / "license" / "README").write_text("of whom the images are")
    data = read(tmp_path, val_fraction=0.0, test_fraction=0.5)
    assert data.class_names == ["license", "passport.txt"]
    assert data.splits is not None
    assert len(data.splits.train) + len(data.splits.test) == 9


def test_one_folder_of_the_same_name_in_each_class_tells_nothing_apart(tmp_path: Path) -> None:
    for name in ("n01", "n02"):  # as Tiny ImageNet has it
        for number in range(4):
            file = tmp_path / name / "images" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, int(name[1:]), 0)).save(file)
    assert read(tmp_path, val_fraction=0.0, test_fraction=0.5).class_names == ["n01", "n02"]


def test_a_class_without_test_or_validation_images_is_named(tree: Tree) -> None:
    tree("val", classes=("cat", "emu"))
    root = tree("train", "test")
    for file in (root / "test" / "dog").iterdir():
        file.unlink()
    data = read(root)
    assert data.caveats()[1:] == ["no validation sample has the class dog", "no test sample has the class dog"]
    assert data.splits is not None
    assert set(data.splits.test[range(12)].targets.tolist()) == {0, 2}


def test_classes_that_training_lacks_are_refused(tree: Tree) -> None:
    tree("test", classes=("cat", "Emu"))
    with pytest.raises(ValueError, match="root/test: the training part has no class Emu; give training images of it"):
        read(tree("train"))


def test_class_names_that_differ_in_case_are_named_and_those_that_differ_in_bytes_are_one(tree: Tree) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    tree("train", classes=(composed, "Dog", "dog"))
    root = tree("test", classes=(decomposed, "Dog", "dog"))
    data = read(root)
    assert data.class_names == ["Dog", composed, "dog"]
    assert data.caveats() == ["classes that differ only in case: Dog, dog"]
    tree("train", classes=(decomposed,))
    with pytest.raises(ValueError, match="another folder has the same name in other bytes of Unicode; merge the two"):
        read(root)


@pytest.mark.parametrize("name", ["a\nb", "a\udcffb"])
def test_a_class_name_that_cannot_be_printed_is_refused(tree: Tree, name: str) -> None:
    with pytest.raises(ValueError, match="its name has control characters, or bytes that are not UTF-8; rename it"):
        read(tree("", classes=("cat", name)))


def test_images_in_subfolders_of_a_class_are_counted(tree: Tree) -> None:
    data = read(tree("", classes=("cat/indoor", "cat/outdoor", "dog")))
    assert data.class_names == ["cat", "dog"]
    assert data.caveats() == ["12 images are in subfolders of their class"]


def test_a_file_is_no_folder(tree: Tree) -> None:
    with pytest.raises(ValueError, match=r"0.png: it is a file; give one with a folder for each class"):
        read(tree("") / "cat" / "0.png")


# Left out or refused -----------------------------------------------------------------------------------------------


def test_ordinary_files_are_ignored_in_silence(tree: Tree) -> None:
    root = tree("", "__MACOSX")
    (root / ".git").mkdir()
    for name in ("LICENSE", "cat/README.txt", "cat/Thumbs.db", "cat/.DS_Store", "cat/._0.png", ".gitignore"):
        (root / name).write_bytes(b"x")
    data = read(root)
    assert data.class_names == ["cat", "dog", "emu"]
    assert data.caveats() == []


def test_everything_else_that_is_left_out_is_counted(tree: Tree) -> None:
    root = tree("")
    for name in ("labels.csv", "cat/1.heic", "cat/2.HEIC", "dog/features.npy"):
        (root / name).write_bytes(b"x")
    (root / "emu" / ".ipynb_checkpoints").mkdir()
    for name in ("stray.png", "cat/.hidden.png", "emu/.ipynb_checkpoints/0.jpg"):
        (root / name).write_bytes(b"x")
    assert read(root).caveats() == [
        "left out: .csv files (1), .heic files (2), .npy files (1), hidden images (2), images outside class folders (1)"
    ]


def test_a_class_whose_images_cannot_be_decoded_here_says_what_they_are(tree: Tree) -> None:
    root = tree("")
    for file in (root / "dog").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"dog: there is no image in it that Pillow here can decode \(but .heic files"):
        read(root)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "tga", "webp", "JPG", "jp2", "qoi", "ico"])
def test_every_image_that_pillow_decodes_is_read(tree: Tree, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow has no AVIF here")
    assert sizes(read(tree("", suffix=suffix))) == [9, 5, 4]


def test_documents_and_films_are_no_images() -> None:
    assert image_suffixes() >= {".png", ".apng", ".tif", ".pnm", ".bmp"}
    assert not image_suffixes() & {".pdf", ".eps", ".mpg", ".h5", ".fits", ".wmf", ".svg", ".npy"}


def test_links_are_followed_and_no_folder_is_read_twice(tree: Tree, tmp_path: Path) -> None:
    root = tree("")
    pool = root.rename(tmp_path / "pool")
    root = tree("")
    (root / "owl").symlink_to(pool / "dog")  # a class elsewhere
    (root / "owl_again").symlink_to(pool / "dog")
    (root / "cat" / "more").symlink_to(pool / "cat")
    (root / "cat" / "one.png").symlink_to(pool / "emu" / "0.png")
    (root / "cat" / "loop").symlink_to("..")
    (root / "ant").symlink_to("dog")  # sorts before the folder itself
    (pool / "cat" / "loop").symlink_to(pool)
    data = read(root)
    assert data.class_names == ["cat", "dog", "emu", "owl"]
    assert sum(sizes(data)) == 18 + 6 + 6 + 1
    assert data.caveats() == [
        "6 images are in subfolders of their class",
        "left out: links to folders that are read anyway (4)",
    ]


@pytest.mark.parametrize("link", ["cat/9.png", "owl"])
@pytest.mark.parametrize("target", ["nothing", "itself"])
def test_links_to_nothing_are_refused(tree: Tree, link: str, target: str) -> None:
    root = tree("")
    (root / link).symlink_to(root / link if target == "itself" else root / "nothing.png")
    with pytest.raises(ValueError, match=f"{link}: the link leads to nothing; restore the files, or remove the link"):
        read(root)
    (root / Path(link).with_name("zebra.png")).symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"leads to nothing, and so do 1 more links in this folder"):
        read(root)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Be somebody who is kept out by permissions, root or not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["cat/0.png", "dog"])
def test_a_file_or_folder_without_permission_is_named(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = tree("")
    monkeypatch.chdir(tmp_path)  # the folders above may be closed to others
    tmp_path.chmod(0o755)
    (root / name).chmod(0)
    with (
        without_privileges(),
        pytest.raises(ValueError, match=rf"{name}: it cannot be read \(Permission denied\); fix"),
    ):
        read(root.relative_to(tmp_path))
    (root / name).chmod(0o755)


@pytest.mark.parametrize(("size", "reason"), [(0, "cannot identify image file"), (120, "image file is truncated")])
def test_empty_and_truncated_files_are_named(tree: Tree, size: int, reason: str) -> None:
    root = tree("")
    file = root / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"cat/0.png: it cannot be decoded \({reason}.*; replace it, or leave it out"):
        read(root)


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("Train", "Test"), ("training", "testing")])
def test_a_run_tells_the_classes_and_not_the_parts_apart(
    run: Callable[..., SimpleNamespace], tree: Tree, train: str, test: str
) -> None:
    root = tree(train, test, count=20)
    words = ["data=imagefolder", f"data.root={root}", "data.batch_size=8", "task.per_class=true"]
    words.append("trainer.limit_test_batches=1.0")
    found = run(*words).metrics
    assert {name for name in found if "/accuracy/" in name} == {f"test/accuracy/{name}" for name in CLASSES}


def test_every_run_of_a_sweep_is_told_of_the_data_that_were_read_once(tree: Tree) -> None:
    root = tree("train", "test")
    (root / "labels.csv").write_bytes(b"x")
    picture = Image.new("RGBA", (8, 8))
    picture.save(root / "train" / "cat" / "clear.png")
    found = []
    with read_once():
        for _ in range(2):
            data = ImageFolder(root=str(root), batch_size=2, val_fraction=0.3)
            setup_data(data, {"root": str(root)})
            found.append(data.caveats())
    assert (
        found[0]
        == found[1]
        == [
            "left out: .csv files (1)",
            "images with transparent pixels, laid over white (1)",
        ]
    )
