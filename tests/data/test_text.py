"""Text: every token once, the parts apart, and errors that name the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ablab.data.hf_text import HFText
from ablab.data.text import Text, read_text
from ablab.data.token_stream import IGNORED, Windows


def test_every_token_of_an_evaluation_split_is_predicted_exactly_once() -> None:
    stream = torch.arange(50)
    windows = Windows([stream], 8, keep_short=True)
    batch = windows[list(range(len(windows)))]
    assert sorted(batch.targets[batch.targets != IGNORED].tolist()) == list(range(1, 50))
    assert torch.equal(batch.targets[:-1, :-1], batch.inputs[:-1, 1:])


def test_training_windows_are_full() -> None:
    windows = Windows([torch.arange(50)], 8, keep_short=False)
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


def test_no_window_reaches_from_one_stream_into_the_next() -> None:
    windows = Windows([torch.arange(20), torch.arange(100, 111)], 8, keep_short=False)
    batch = windows[range(len(windows))]
    assert batch.inputs[:, 0].tolist() == [0, 8, 100]
    assert torch.equal(batch.targets, batch.inputs + 1)


@pytest.mark.parametrize("tokens", ["characters", "bytes", "bpe"])
def test_what_is_encoded_can_be_read_again(tmp_path: Path, tokens: str) -> None:
    text = "Grüße, 世界!\r\n  Und  weiter. " * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    data = Text(path=str(tmp_path), tokens=tokens, context_length=4, vocab_size=280)
    data.setup()
    assert data.tokens.decode(data.tokens.encode(text)) == text
    assert data.splits is not None
    held_out = text[len(text) - 2 * int(len(text) * 0.05) :]
    spent = len(data.splits.val.stream) + len(data.splits.test.stream)
    assert data.characters_per_token == len(held_out) / spent
    if tokens == "characters":
        assert data.characters_per_token == 1.0


def test_byte_pairs_are_learned_from_the_training_part_alone_and_encode_everything(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 200 + "世界 " * 20)  # the end is for testing
    data = Text(path=str(tmp_path / "a.txt"), tokens="bpe", vocab_size=270, context_length=4)
    data.setup()
    assert data.model_sizes["vocab_size"] <= 270
    assert any("be" in entry for entry in data.tokens.entries)
    assert len(data.tokens.encode("世")) == 3  # never seen in training: its three bytes
    assert data.tokens.decode(data.tokens.encode("世界")) == "世界"
    with pytest.raises(ValueError, match="vocab_size=100: at least 257 are needed"):
        Text(tokens="bpe", vocab_size=100).setup()


def test_a_character_that_the_vocabulary_lacks_is_named() -> None:
    data = Text(context_length=16)
    data.setup()
    with pytest.raises(ValueError, match="the vocabulary has no '世', '界'"):
        data.tokens.encode("hello 世界")


def test_documents_of_the_hub_are_read_by_their_column(files: Path) -> None:
    data = HFText(name="topics", root=str(files / "text"), context_length=32)
    data.setup()
    assert data.splits is not None
    text = data.tokens.decode(data.splits.test.stream)
    assert "\n\n" in text
    divided = HFText(name="topics", root=str(files / "text"), val_split=None, test_split=None, context_length=32)
    divided.setup()
    assert divided.splits is not None
    assert len(divided.splits.test.stream) < len(data.splits.test.stream)


def test_columns_and_rows_that_are_no_text_are_named(files: Path, tmp_path: Path) -> None:
    import datasets

    with pytest.raises(
        ValueError, match=r"train split has the columns text, and words is missing in .*; set data.text"
    ):
        HFText(name="topics", root=str(files / "text"), text_column="words").setup()
    for split in ("train", "validation", "test"):
        datasets.Dataset.from_dict({"text": ["one", None, "three"]}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=r"train.parquet, row 1: text is no text there \(None\)"):
        HFText(name="x", root=str(tmp_path)).setup()
    with pytest.raises(ValueError, match="val_split=validation, test_split=None: name both parts, or none"):
        HFText(name="x", root=str(tmp_path), test_split=None)


def test_the_default_text_ships_with_python() -> None:
    text, _ = read_text(None)
    assert len(text) > 100_000
    assert "lambda" in text


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    assert read_text(str(tmp_path)) == ("first\nsecond", [])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path=/no/such: there is no such file or folder"):
        read_text("/no/such")
    with pytest.raises(ValueError, match="the folder is empty"):
        read_text(str(tmp_path))
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 \(line 1, byte 3 is 0xff\)"):
        read_text(str(tmp_path))


def test_hidden_files_backups_and_checkpoints_are_left_out_and_said(tmp_path: Path) -> None:
    book, root = " ".join(f"word{i}" for i in range(3000)), tmp_path / "txt"
    for name in (
        ".ipynb_checkpoints/book-checkpoint.txt",
        ".hidden.txt",
        "__pycache__/book.pyc",
        "__MACOSX/._book.txt",
        "book.txt~",
        "#book.txt#",
        "book.txt.bak",
        "BOOK.BAK",
        ".book.txt.swp",
        "book.txt.orig",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{book} {name}")
    (root / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\xff")
    os.mkfifo(root / "pipe")  # reading it would wait forever
    (root / "book.txt").write_text(book)
    (root / "read.me").write_text("any other file is text")
    assert read_text(str(root)).text == f"{book}\nany other file is text"
    data = Text(path=str(root))
    data.setup()
    assert data.caveats() == ["12 hidden files and backups left out (#book.txt#, .DS_Store, .book.txt.swp, …)"]


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / ".notes~").write_text("mine")
    assert read_text(str(tmp_path / ".notes~")) == ("mine", [])
    (tmp_path / ".folder").mkdir()
    (tmp_path / ".folder" / "a.txt").write_text("mine, too")
    assert read_text(str(tmp_path / ".folder")) == ("mine, too", [])


def test_a_byte_order_mark_is_no_character_and_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\r\ntwo", encoding="utf-8-sig", newline="")
    (tmp_path / "b.txt").write_text("three\rfour\ufeff", encoding="utf-8-sig", newline="")
    assert read_text(str(tmp_path)).text == "one\r\ntwo\nthree\rfour\ufeff"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text".encode("utf-16"), "x.txt is UTF-16; convert it to UTF-8, or leave it out"),
        (b"\xfe\xff\0t", "x.txt is UTF-16"),
        (b"ab\0c", r"x.txt is binary \(byte 2 is 0x00\); leave it out"),
        (b"\x89PNG\r\n\x1a\n", r"x.txt is not UTF-8 \(line 1, byte 0 is 0x89\)"),
        (b"\xef\xbb\xbfab\n\xff", r"x.txt is not UTF-8 \(line 2, byte 6 is 0xff\)"),
    ],
)
def test_files_that_are_no_text_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(str(tmp_path))


def test_copies_of_a_file_are_read_once_and_said(tmp_path: Path) -> None:
    for name, text in (("a.txt", "one"), ("b.txt", "two"), ("copy of a.txt", "one"), ("empty", ""), ("none", "")):
        (tmp_path / name).write_text(text)
    (tmp_path / "z.txt").symlink_to(tmp_path / "b.txt")
    assert read_text(str(tmp_path)) == ("one\ntwo\n\n", ["2 copies of other files left out (copy of a.txt, z.txt)"])


def test_linked_folders_are_read_once_and_dangling_links_are_refused(tmp_path: Path) -> None:
    for name in ("root", "disk/deep"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "disk" / "deep" / "a.txt").write_text("far away")
    (tmp_path / "root" / "b.txt").write_text("here")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "disk")
    (tmp_path / "root" / "d").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "root")
    assert read_text(str(tmp_path / "root")) == ("here\nfar away", [])
    (tmp_path / "root" / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"gone.txt cannot be read \(a link to a file that is not there\)"):
        read_text(str(tmp_path / "root"))
    (tmp_path / "root" / "gone.txt").unlink()
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root" / "loop")
    with pytest.raises(ValueError, match=r"loop cannot be read"):
        read_text(str(tmp_path / "root"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="this is neither a file nor a folder; give a UTF-8 text"):
        read_text(str(tmp_path / "pipe"))


def test_the_order_of_files_is_that_of_code_points(tmp_path: Path) -> None:
    names = ["B.txt", "Z", "a.txt", "a/x", "z.txt", "ä.txt"]  # a locale's order would begin with a
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_text(str(tmp_path)).text.split("\n") == ["B.txt", "Z", "a/x", "a.txt", "z.txt", "ä.txt"]


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
