"""Pixels of encoded images are those that people see, and that `datasets` gives."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ablab.data import encoded_images
from ablab.data.encoded_images import ANIMATED, TRANSPARENT, Encoded, EncodedImages, load_image
from ablab.data.image_folder import ImageFolder

Bytes = Callable[..., bytes]
PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def encode(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def decode(content: bytes, in_channels: int = 3) -> tuple[np.ndarray[Any, Any], list[str]]:
    """An image `(H, W, C)` as it is decoded, and the notes on it."""
    notes: list[str] = []
    image = load_image(Encoded([content], [0], lambda i: f"image {i}"), 0, None, in_channels, notes)
    return image.permute(1, 2, 0).numpy(), notes


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_datasets_turns_them(kind: str, orientation: int) -> None:
    import datasets

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(Image.fromarray(PIXELS), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = datasets.Image().decode_example({"bytes": content, "path": None}).convert("RGB")
    found, notes = decode(content)
    assert found.shape == ((5, 7, 3) if orientation <= 4 else (7, 5, 3))
    np.testing.assert_array_equal(found, np.asarray(expected))
    assert notes == []


def transparent(mode: str) -> bytes:
    """The right half of a black image is transparent."""
    alpha = np.full((4, 4), 255, dtype=np.uint8)
    alpha[:, 2:] = 0
    if mode in ("RGBA", "LA"):
        black = Image.new(mode, (4, 4))
        black.putalpha(Image.fromarray(alpha))
        return encode(black)
    marked = Image.fromarray(np.where(alpha, 0, 7).astype(np.uint8))
    if mode == "P":
        marked.putpalette([0] * 768)
        return encode(marked, transparency=7)
    if mode == "GIF":
        marked.putpalette([0] * 768)
        return encode(marked, "GIF", transparency=7)
    return encode(marked.convert(mode), transparency=7 if mode == "L" else (7, 7, 7))


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF", "L", "RGB"])
def test_transparent_pixels_are_laid_over_white_and_noted(mode: str, in_channels: int) -> None:
    found, notes = decode(transparent(mode), in_channels)
    assert found.shape == (4, 4, in_channels)
    assert (found[:, :2] == 0).all()
    assert (found[:, 2:] == 255).all()
    assert notes == [TRANSPARENT]


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    found, notes = decode(encode(Image.new("RGBA", (2, 2), (200, 100, 0, 51))))
    np.testing.assert_allclose(found[0, 0], [244, 224, 204], atol=1)
    assert notes == [TRANSPARENT]


def test_an_alpha_channel_that_hides_nothing_changes_nothing() -> None:
    opaque = Image.fromarray(PIXELS)
    opaque.putalpha(255)
    found, notes = decode(encode(opaque))
    np.testing.assert_array_equal(found, PIXELS)
    assert notes == []


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_frames_is_taken_and_noted(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), (level, level, level)) for level in (40, 90, 140)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    found, notes = decode(content)
    assert (abs(found.astype(int) - 40) <= 2).all()
    assert notes == [ANIMATED]


def test_a_previews_frame_in_a_photograph_is_not_noted() -> None:
    frames = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (40, 90)]
    assert decode(encode(frames[0], "MPO", save_all=True, append_images=frames[1:]))[1] == []


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_other_modes_are_converted_as_pillow_does(mode: str, in_channels: int) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    content = encode(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    expected = Image.open(io.BytesIO(content)).convert("RGB" if in_channels == 3 else "L")
    found, notes = decode(content, in_channels)
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(found.shape))
    assert notes == []


def test_sixteen_bits_are_refused_with_transparency_too() -> None:
    deep = Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))
    for content in (encode(deep), encode(deep, transparency=40_000)):
        with pytest.raises(ValueError, match=r"image 0: it has more than 8 bits a channel \(mode I;16\); convert it"):
            decode(content)


def folder(root: Path) -> ImageFolder:
    data = ImageFolder(root=str(root), batch_size=2, val_fraction=0.3)
    data.setup()
    return data


def test_notes_are_counted_over_the_parts_and_kept_with_the_cache(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, name in enumerate(f"{part}/{label}" for part in ("train", "test") for label in ("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGBA", (4, 4), (number, i, 9, 0 if i == 0 else 255)).save(root / name / f"{i}.png")
    first, second = folder(root), folder(root)
    assert first.caveats()[-1] == second.caveats()[-1]
    assert "images with transparent pixels, laid over white (4)" in first.caveats()
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("name", ["DECODER", "CODECS"])
def test_the_cache_has_another_key_for_another_decoder(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Data(EncodedImages):
        def load(self) -> Any: ...

    before = Data().cache_key("x")
    assert before == Data().cache_key("x")
    monkeypatch.setattr(encoded_images, name, {"DECODER": -1, "CODECS": ("jpg",)}[name])
    assert Data().cache_key("x") != before


def test_the_digests_in_the_cache_are_those_of_the_decoded_images(files: Path) -> None:
    from ablab.data.batch import Samples

    data = ImageFolder(root=str(files / "folder"), in_channels=1)
    data.setup()
    assert data.splits is not None
    test = data.splits.test
    assert isinstance(test, Samples)
    assert torch.equal(test.digests, Samples(test.tensors.inputs.clone(), test.tensors.targets).digests)
