"""A stream whose images break while a run trains: one message, and a run that can be resumed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from ablab.data import stream as module
from ablab.data.stream import ImageStream, Row, StreamLoader
from ablab.errors import ConfigError, RunError
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train
from ablab.tasks.task import Task


def stream(decode: Callable[[Row], Tensor], rows: int = 40, there: int = 40) -> ImageStream:
    """Rows in blocks of eight that say their number."""

    def read(start: int) -> Iterator[Row]:
        for number in range(start, there):
            yield Row(number, b"", number % 2)

    return ImageStream(read, rows, decode, block_size=8, name="numbers")


def image(row: Row, size: int = 2) -> Tensor:
    return torch.full((1, size, size), row.number, dtype=torch.uint8)


def fails_at(number: int, error: Exception) -> Callable[[Row], Tensor]:
    def decode(row: Row) -> Tensor:
        if row.number == number:
            raise error
        return image(row)

    return decode


@pytest.fixture(autouse=True)
def _small_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD", 8)


@pytest.mark.parametrize("error", [ValueError("row 20: broken"), FileNotFoundError("row 20: gone")])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_broken_row_ends_a_stream_at_its_batch_and_leaves_no_threads(error: Exception, num_threads: int) -> None:
    before = threading.active_count()
    loader = StreamLoader(stream(fails_at(20, error)), batch_size=4, seed=0, num_threads=num_threads)
    expected = [batch.inputs[:, 0, 0, 0].tolist() for batch in StreamLoader(stream(image), batch_size=4, seed=0)]
    batches = iter(loader)
    for numbers in takewhile(lambda numbers: 20 not in numbers, expected):
        assert next(batches).inputs[:, 0, 0, 0].tolist() == numbers
    with pytest.raises(RunError, match=r"row 20: .*; resume with the original file in its place, or start a new run"):
        next(batches)
    assert threading.active_count() == before


def test_an_image_of_another_size_is_named() -> None:
    sizes = {5: 3, 20: 3}
    with pytest.raises(ValueError, match=r"training row 5: it has 3x3 pixels, and the first image 2x2; set data.image"):
        stream(lambda row: image(row, sizes.get(row.number, 2)))
    del sizes[5]
    with pytest.raises(RunError, match=r"training row 20: it has 3x3 pixels, and the first image 2x2; set data.image"):
        list(StreamLoader(stream(lambda row: image(row, sizes.get(row.number, 2))), batch_size=4, seed=0))


def test_a_file_that_became_shorter_ends_the_run_with_a_message() -> None:
    with pytest.raises(RunError, match="the training part ends in batch 5 of 10: it has fewer rows than the 40 that"):
        list(StreamLoader(stream(image, there=22), batch_size=4, seed=0))


def test_rows_that_cannot_be_read_end_the_run_with_a_message() -> None:
    def read(start: int) -> Iterator[Row]:
        for number in range(start, 40):
            if number == 30:
                raise OSError("unexpected end of shard-3.parquet")
            yield Row(number, b"", 0)

    loader = StreamLoader(ImageStream(read, 40, image, block_size=8, name="x"), batch_size=4, seed=0)
    with pytest.raises(RunError, match=r"rows of batch 6 cannot be read \(unexpected end of shard-3.parquet\); resume"):
        list(loader)


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A run that streams images of their own files."""
    import datasets

    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, count in (("train", 48), ("val", 8), ("test", 8)):
        for i in range(count):
            pixels = np.random.default_rng([i, count]).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{split}{i}.png")
        table = {
            "image": [str(tmp_path / f"{split}{i}.png") for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
        datasets.Dataset.from_dict(table, kinds).to_parquet(tmp_path / f"{split}.parquet")
    return [
        *("data=hf_image", f"data.root={tmp_path}", "data.name=x", "data.val_split=val", "data.streaming=true"),
        *("data.shuffle_block=8", "data.batch_size=8", "trainer=cpu", "trainer.max_epochs=1"),
        *("callbacks.checkpoints.every_n_steps=1", "trainer.log_every_n_steps=1"),
    ]


@pytest.mark.parametrize("damage", ["broken", "gone"])
def test_an_image_that_breaks_while_a_run_trains_ends_it_and_once_it_is_mended_the_run_goes_on(
    run: Callable[..., SimpleNamespace], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    expected = run(*words)
    file = tmp_path / "train30.png"  # of the fourth batch: those before are decoded already when the first is learned
    content, original = file.read_bytes(), Task.training_step

    def step(self: Task, *arguments: Any) -> Any:
        if damage == "broken":
            file.write_bytes(content[:100])
        else:
            file.unlink(missing_ok=True)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "training_step", step)
        with pytest.raises(RunError, match=r"train\.parquet, row 30: .*; resume with the original file in its"):
            run(*words, f"output_dir={tmp_path}/again")
    [folder] = (tmp_path / "again").iterdir()
    assert list((folder / "checkpoints").iterdir())
    file.write_bytes(content)
    assert train(resume_config(OmegaConf.create({"resume": str(folder), "trust": None}))).metrics == expected.metrics


def test_an_image_that_is_broken_from_the_beginning_is_bad_input(
    run: Callable[..., SimpleNamespace], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "train3.png").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"data.*train\.parquet, row 3: it cannot be decoded .*; replace it, or leave it out"
    ):
        run(*words)
    assert not (tmp_path / "runs").exists()
