"""Images with masks: pairs of files, the digits' scenes, and augmentation that moves both alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ablab.data.augment import Augment
from ablab.data.batch import Batch, Samples
from ablab.data.digit_scenes import DigitScenes, make_scenes
from ablab.data.digits import load_digits
from ablab.data.image_masks import ImageMasks
from ablab.data.labelled import OfficialSplits
from ablab.data.masks import Masks
from ablab.data.rng import index_seeds

Tree = Callable[..., Path]
Pixels = NDArray[np.uint8]


def noise(shape: tuple[int, ...], high: int = 256) -> Pixels:
    return np.random.default_rng(high).integers(0, high, shape, dtype=np.uint8)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Write images and masks of three classes, each another one, into folders of parts."""
    written = 0

    def write(*parts: str, count: int = 10, size: tuple[int, int] = (6, 8)) -> Path:
        nonlocal written
        for part in parts or ("",):
            for folder in ("images", "masks"):
                (tmp_path / "root" / part / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                written += 1
                rng = np.random.default_rng(written)
                save(tmp_path / "root" / part / f"images/{number}.png", rng.integers(0, 256, (*size, 3), np.uint8))
                save(tmp_path / "root" / part / f"masks/{number}.png", rng.integers(0, 3, size, np.uint8))
        return tmp_path / "root"

    return write


def save(path: Path, pixels: Pixels, mode: str | None = None) -> None:
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    elif mode is not None:
        image = image.convert(mode)
    image.save(path)


def read(root: Path, **settings: Any) -> ImageMasks:
    data = ImageMasks(root=str(root), batch_size=2, **{"val_fraction": 0.25, **settings})
    data.setup()
    return data


def sizes(data: Masks) -> list[int]:
    assert data.splits is not None
    return [len(part) for part in (data.splits.train, data.splits.val, data.splits.test)]


def whole(data: Masks, part: str = "test") -> Batch:
    split = getattr(data.splits, part)
    assert isinstance(split, Samples)
    return split.as_batch()


# Folders of images and masks ---------------------------------------------------------------------------------------


def test_a_folder_without_parts_is_divided_at_random_and_always_alike(tree: Tree) -> None:
    root = tree()
    data = read(root)
    assert sizes(data) == [6, 2, 2]
    assert data.class_names == ["0", "1", "2"]
    assert data.caveats() == []
    assert read(root).fingerprint == data.fingerprint
    other = read(root, split_seed=1)
    assert torch.equal(whole(other).inputs, whole(data).inputs), "the test images are always the same"
    assert not torch.equal(whole(other, "val").inputs, whole(data, "val").inputs)
    assert sizes(read(root, test_fraction=0.5)) == [3, 2, 5]
    assert sizes(read(root, val_fraction=0)) == [8, 0, 2]


def test_parts_have_their_usual_names_and_missing_ones_are_held_out(tree: Tree) -> None:
    root = tree("train", "Validation", "test")
    data = read(root, test_fraction=0.3)
    assert sizes(data) == [10, 10, 10]
    assert data.caveats() == [
        "tested on test, test_fraction is not used",
        "validated on the given validation part, val_fraction is not used",
    ]
    assert sizes(read(root, folds=5, fold=1)) == [8, 2, 10]


def test_a_missing_test_part_is_reported(tree: Tree) -> None:
    data = read(tree("training"))
    assert sizes(data) == [6, 2, 2]
    assert data.caveats() == ["no test folder, so 20% of training is held out to test"]


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_a_mask_has_the_values_of_its_pixels_whatever_its_palette(tree: Tree, mode: str) -> None:
    root = tree("train", "test")
    pixels = noise((6, 8), 2)
    save(root / "test/masks/0.png", pixels * 255 if mode == "1" else pixels, mode)
    assert torch.equal(whole(read(root)).targets[0], torch.from_numpy(pixels))


def test_images_and_masks_are_scaled_and_cut_alike(tree: Tree) -> None:
    root = tree("train", "test", size=(16, 24))
    pixels = np.zeros((16, 24), dtype=np.uint8)
    pixels[:, 12:] = 2
    save(root / "test/masks/0.png", pixels)
    save(root / "test/images/0.png", np.repeat(pixels[..., None] * 100, 3, 2))
    batch = whole(read(root, image_size=8))
    assert batch.inputs.shape == (10, 3, 8, 8)
    assert batch.targets[0].unique().tolist() == [0, 2], "nearest: no class between the two"
    assert torch.equal(batch.targets[0][:, :4], torch.zeros(8, 4, dtype=torch.uint8))
    assert batch.inputs[0, 0, :, 1].max() == 0
    assert batch.inputs[0, 0, :, 6].min() == 200


def test_ignored_pixels_are_no_class(tree: Tree) -> None:
    root = tree()
    pixels = noise((6, 8), 3)
    pixels[0] = 255
    save(root / "masks/3.png", pixels)
    data = read(root)
    assert data.class_names == ["0", "1", "2"]
    assert int((torch.cat([whole(data, part).targets for part in ("train", "val", "test")]) == 255).sum()) == 8


def test_names_of_classes_may_be_more_than_there_are_and_that_is_reported(tree: Tree) -> None:
    data = read(tree(), class_names=["ground", "road", "car", "sky"])
    assert data.model_sizes == {"in_channels": 3, "num_classes": 4}
    assert data.task_sizes == {"pixel_classes": ["ground", "road", "car", "sky"]}
    assert data.caveats()[0] == "no training sample has the class sky"


def test_a_mask_that_changes_is_read_again(tree: Tree) -> None:
    root = tree()
    before = read(root).fingerprint
    save(root / "masks/3.png", noise((6, 8), 3))
    assert read(root).fingerprint != before


def missing_mask(root: Path) -> None:
    (root / "masks/4.png").unlink()
    (root / "masks/7.png").unlink()


def color_mask(root: Path) -> None:
    save(root / "masks/4.png", noise((6, 8, 3)))


def jpeg_mask(root: Path) -> None:
    (root / "masks/4.png").unlink()
    Image.fromarray(noise((6, 8))).save(root / "masks/4.jpg")


def no_images(root: Path) -> None:
    for folder in ("images", "masks"):
        for file in (root / folder).iterdir():
            file.unlink()
    (root / "images/1.npy").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_mask, r"images/4.png: there is no mask of this name, and 1 more have none; add masks/4.png, or leave"),
        (
            lambda root: (root / "images/4.png").unlink(),
            r"masks/4.png: there is no image of this name; add it to images",
        ),
        (
            lambda root: save(root / "masks/4.png", noise((8, 6), 3)),
            r"masks/4.png: the mask has 8x6 pixels and its image 6x8 .*; bring both to one size",
        ),
        (
            lambda root: save(root / "masks/4.png", noise((6, 8), 3) * 60),
            r"the masks have class numbers up to 120, and none has 3, 4, 5, 6, 7, 111 more; number the classes from 0",
        ),
        (
            lambda root: [save(file, noise((6, 8), 2) * 255) for file in (root / "masks").iterdir()],
            r"the masks have the class numbers \[0\] alone, and 255 is a pixel that does not count; at least two",
        ),
        (
            color_mask,
            r"masks/4.png: it is a PNG of mode RGB; a mask is a PNG, palette or gray with 8 bits, whose pixel",
        ),
        (jpeg_mask, r"masks/4.jpg: it is a JPEG of mode L; a mask is a PNG"),
        (no_images, r"root/images: there are no images in it .*\(but .npy files \(1\)\); give some, each with a mask"),
        (lambda root: (root / "masks/4.png").write_bytes(b"no"), r"masks/4.png: it cannot be decoded \(.*\); replace"),
        (
            lambda root: Image.fromarray(noise((6, 8, 3))).save(root / "images/4.jpg"),
            r"images/4.jpg: 4.png has the same name but for its suffix; leave one of them out",
        ),
        (
            lambda root: [save(root / f"{f}/4.png", noise((8, 8), 3)) for f in ("images", "masks")],
            r"images/4.png: it has 8x8 pixels, and the first image 6x8; set data.image_size",
        ),
        (
            lambda root: (root / "masks").rename(root / "labels"),
            r"there is no folder masks in it; the layouts are root/",
        ),
    ],
)
def test_files_that_are_wrong_are_refused_by_name(tree: Tree, damage: Callable[[Path], Any], message: str) -> None:
    root = tree()
    damage(root)
    with pytest.raises(ValueError, match=message):
        read(root)


def test_a_class_number_out_of_range_is_refused_with_its_file(tree: Tree) -> None:
    with pytest.raises(
        ValueError, match=r"masks/\d.png: it has the class number 2, and data.class_names has 2 classes; use"
    ):
        read(tree(), class_names=["no", "yes"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("val", "test"), "it has no folders images and masks, and no folder train; the layouts are root/images"),
        (("train", "val", "valid"), "val and valid are both names of the val part; leave one out"),
    ],
)
def test_folders_that_are_no_layout_are_refused(tree: Tree, parts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tree(*parts))


def test_a_part_beside_images_and_masks_is_refused(tree: Tree) -> None:
    root = tree()
    (root / "test").mkdir()
    with pytest.raises(
        ValueError, match="it has the folder test beside images and masks; move these two into a folder"
    ):
        read(root)


def test_a_root_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root=.*nothing: there is no such folder; give one with the folders"):
        read(tmp_path / "nothing")


def test_what_is_left_out_is_counted(tree: Tree) -> None:
    root = tree("train", "test")
    (root / "train/images/notes.csv").write_text("")
    (root / "extra").mkdir()
    (root / "extra/1.png").write_bytes(b"")
    assert read(root).caveats() == ["left out: .csv files (1), entries of folder extra (1)"]


class Own(Masks):
    def load(self) -> OfficialSplits:
        self.class_names = ["a", "b"]
        masks = torch.zeros(9, 2, 2, dtype=torch.uint8)
        masks[7, 1, 1] = 2
        return OfficialSplits(Samples(torch.rand(9, 1, 2, 2), masks), Samples(torch.rand(2, 1, 2, 2), masks[:2]))

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"in_channels": 1, "num_classes": 2}


def test_masks_of_ones_own_are_checked() -> None:
    with pytest.raises(ValueError, match=r"the train part has a mask with the class number 2 \(sample 7\)"):
        Own(batch_size=2).setup()


# The digits' scenes ------------------------------------------------------------------------------------------------


def test_every_digit_is_whole_and_in_one_scene() -> None:
    """So no digit is in two parts, however the scenes are divided."""
    ink = torch.full((198, 8, 8), 16, dtype=torch.uint8)
    masks = make_scenes(ink, torch.arange(198)).targets
    counts = torch.stack([mask.flatten().bincount(minlength=199) for mask in masks])[:, 1:]
    assert torch.equal((counts > 0).sum(0), torch.ones(198, dtype=torch.int64))
    assert torch.equal(counts.sum(0), torch.full((198,), 64)), "none covers another"
    assert (counts > 0).sum(1).bincount().tolist() == [0, 33, 33, 33]


def test_a_mask_has_a_digits_class_where_its_ink_is() -> None:
    images, digits = load_digits()
    masks = make_scenes(images[:1], digits[:1]).targets
    rows, columns = masks[0].any(1).nonzero().flatten(), masks[0].any(0).nonzero().flatten()
    found = masks[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = images[0] >= 4
    expected = ink[ink.any(1)][:, ink.any(0)] * (digits[0] + 1)
    assert torch.equal(found.long(), expected)


def test_scenes_have_one_to_three_digits_and_all_classes() -> None:
    data = DigitScenes()
    data.setup()
    assert sizes(data) == [575, 144, 180]
    for part in ("train", "val", "test"):
        batch = whole(data, part)
        assert batch.targets.unique().tolist() == list(range(11))
        assert 0 <= int(batch.inputs.min()) <= int(batch.inputs.max()) <= 16
    again = DigitScenes()
    again.setup()
    assert again.fingerprint == data.fingerprint


# Augmentation ------------------------------------------------------------------------------------------------------


def moved(augment: Augment, images: Tensor, masks: Tensor, seed: int) -> Batch:
    own = index_seeds(seed, torch.arange(len(images)))
    seeds = torch.stack([own, torch.full_like(own, seed % 3)], dim=1)
    batch = augment.augment_raw(Batch(images, masks, seeds=seeds), (0.0, 255.0))
    return augment.augment_standardized(batch, 3)


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
@pytest.mark.parametrize("seed", range(5))
def test_a_mask_moves_with_its_image(flip: Any, seed: int) -> None:
    values = torch.randint(1, 255, (20, 7, 9), dtype=torch.uint8)
    for mode in ("reflect", "zeros"):
        augment = Augment(crop_padding=3, crop_mode=mode, flip=flip)  # type: ignore[arg-type]
        batch = moved(augment, values[:, None], values, seed)
        images, masks = batch.inputs[:, 0], batch.targets
        assert not torch.equal(images, values)
        assert masks.dtype == torch.uint8
        outside = masks == 255
        assert bool(outside.any()) == (mode == "zeros")
        assert torch.equal(images, masks.masked_fill(outside, 0)), "zeros of the image are ignored pixels of the mask"


def test_colors_and_holes_leave_the_mask_alone() -> None:
    images, masks = torch.rand(8, 3, 7, 9) * 255, torch.randint(0, 3, (8, 7, 9), dtype=torch.uint8)
    batch = moved(Augment(color_jitter=0.5, cutout=3), images, masks, 0)
    assert torch.equal(batch.targets, masks)
    assert not torch.equal(batch.inputs, images)
