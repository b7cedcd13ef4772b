"""Text: every token once, the parts apart, and errors that name the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ablab.data.text import IGNORED, Text, Windows, read_text


def test_every_token_of_an_evaluation_split_is_predicted_exactly_once() -> None:
    stream = torch.arange(50)
    windows = Windows(stream, 8, keep_short=True)
    batch = windows[list(range(len(windows)))]
    assert sorted(batch.targets[batch.targets != IGNORED].tolist()) == list(range(1, 50))
    assert torch.equal(batch.targets[:-1, :-1], batch.inputs[:-1, 1:])


def test_training_windows_are_full() -> None:
    windows = Windows(torch.arange(50), 8, keep_short=False)
    batch = windows[list(range(len(windows)))]
    assert batch.inputs.shape == (6, 8)
    assert torch.equal(batch.targets, batch.inputs + 1)


def test_the_parts_of_the_text_do_not_overlap(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + i) for i in range(2000)))  # every character once
    data = Text(path=str(tmp_path / "a.txt"), context_length=16)
    data.setup()
    assert data.splits is not None
    parts = [set(part.stream.tolist()) for part in (data.splits.train, data.splits.val, data.splits.test)]
    assert [len(part) for part in parts] == [1800, 100, 100]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


@pytest.mark.parametrize("tokens", ["characters", "bytes"])
def test_what_is_encoded_can_be_read_again(tmp_path: Path, tokens: str) -> None:
    text = "Grüße, 世界! " * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = Text(path=str(tmp_path), tokens=tokens, context_length=4)
    data.setup()
    assert data.decode(data.encode(text)) == text
    expected = 1.0 if tokens == "characters" else len(text) / len(text.encode())
    assert data.characters_per_token == expected


def test_the_default_text_ships_with_python() -> None:
    text = read_text(None)
    assert len(text) > 100_000
    assert "lambda" in text


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_text(str(tmp_path)) == "first\nsecond"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path=/no/such: there is no such file or folder"):
        read_text("/no/such")
    with pytest.raises(ValueError, match="the folder is empty"):
        read_text(str(tmp_path))
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 \(byte 3 is 0xff\)"):
        read_text(str(tmp_path))


def test_too_little_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    with pytest.raises(ValueError, match=r"the text has 18 tokens.* need at least 129 each"):
        Text(path=str(tmp_path / "a.txt")).setup()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_length": 0}, "context_length=0"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "val_fraction=0.6"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Text(**settings)


def test_tiny_shakespeare_has_65_characters(shared_data: Callable[[str], Path]) -> None:
    data = Text(path=str(shared_data("tinyshakespeare")))
    data.setup()
    assert data.model_sizes == {"vocab_size": 65, "context_length": 128}
