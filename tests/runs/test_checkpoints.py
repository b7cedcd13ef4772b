"""Files that are written whole or not at all, and believed only when they are what was written."""

from __future__ import annotations

import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ablab.errors import ConfigError, RunError
from ablab.lab.loggers.csv_file import MetricsCSV, read_rows
from ablab.lab.run import checkpoint_files
from ablab.lab.run.checkpoint_files import (
    BrokenFile,
    list_checkpoints,
    newest_valid,
    read,
    read_weights,
    write,
    write_weights,
)

STATE: dict[str, Any] = {"state_dict": {"model.a": torch.arange(100.0)}, "num_rows": 3}


class Harmful:
    """A pickle that makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "00000001-end.ckpt"
    write(STATE, file)
    assert torch.equal(read(file)["state_dict"]["model.a"], STATE["state_dict"]["model.a"])
    assert torch.load(file, weights_only=True)["num_rows"] == 3, "torch itself reads it"
    assert zipfile.ZipFile(file).testzip() is None
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("kind", ["state", "weights"])
def test_no_changed_byte_and_no_cut_is_believed(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x"
    if kind == "state":
        write(STATE, file)
    else:
        write_weights({"a": torch.arange(100.0)}, file, step=3)
    opened = read if kind == "state" else read_weights
    opened(file)
    content = file.read_bytes()
    places = random.Random(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[places.randrange(len(content))] ^= 1 << places.randrange(8)
        file.write_bytes(changed)
        try:
            found = opened(file)
        except BrokenFile:
            continue
        else:  # a step in the header of the weights, which are themselves as they were
            assert kind == "weights"
            assert torch.equal(found["a"], torch.arange(100.0))
    for size in [0, 1, 7, 8, 20, 90, 200, *(places.randrange(len(content)) for _ in range(50)), len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(BrokenFile, match=r"it is cut off|no checkpoint|holds no weights|differs"):
            opened(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(BrokenFile):
        opened(file)


def test_a_file_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    for name in ("plain", "forged", "signed"):
        file = tmp_path / f"{name}.ckpt"
        if name == "plain":
            file.write_bytes(pickle.dumps(Harmful(harm)) * 20)
        elif name == "forged":
            torch.save({"x": Harmful(harm)}, file)
        else:  # with a right hash: whoever knows the format can make one
            write({"x": Harmful(harm), **STATE}, file)
        with pytest.raises(BrokenFile):
            read(file)
        with pytest.raises(BrokenFile):
            read_weights(file)
    assert not harm.exists()
    torch.load(tmp_path / "signed.ckpt", weights_only=False)
    assert harm.exists(), "read as others read checkpoints, it does its harm"


def test_the_newest_sound_one_is_found(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    for name in ("00000009-end", "00000010-validation", "00000010-training", "00000002-training"):
        write({**STATE, "name": name}, tmp_path / f"{name}.ckpt")
    write(STATE, tmp_path / "other.ckpt")  # no name of ours
    order = ["00000002-training", "00000009-end", "00000010-validation", "00000010-training"]
    assert [path.stem for path in list_checkpoints(tmp_path)] == order
    (tmp_path / "00000010-training.ckpt").write_bytes(b"")
    (tmp_path / "00000010-validation.ckpt").write_bytes(b"x" * 1000)
    said: list[str] = []
    found = newest_valid(tmp_path, said.append)
    assert found is not None
    assert (found[0].stem, found[1]["name"]) == ("00000009-end", "00000009-end")
    assert len(said) == 2


def test_weights_of_every_type_are_read_as_they_were(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    weights = {
        "half": torch.randn(5).bfloat16(),
        "counts": torch.tensor(7),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "tied.a": shared,
        "tied.b": shared,
        "transposed": shared.t(),
    }
    write_weights(weights, tmp_path / "w.safetensors", step=1)
    found = read_weights(tmp_path / "w.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) and found[name].dtype == weights[name].dtype for name in weights)


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    file = tmp_path / "00000001-end.ckpt"
    write(STATE, file)
    before = file.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, place, full)
    with pytest.raises(RunError, match=r"it could not be written .*No space left on device.*resume the run"):
        checkpoint_files.write({**STATE, "num_rows": 4}, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A limit on the size of files, in bytes, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_find_no_room_leave_those_before_them(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    log = MetricsCSV(tmp_path, seconds=1000)
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    before = (tmp_path / "metrics.csv").read_text()
    for name in ("a", "b"):  # rows at the end; the whole file, for a new column
        for step in range(200):
            log.log_metrics({name: 1.0}, step)
        small_files(500)
        with pytest.raises(RunError, match=r"metrics\.csv: it could not be written .*File too large.*resume the run"):
            log.save()
        assert (tmp_path / "metrics.csv").read_text() == before
    small_files(resource.RLIM_INFINITY)
    log.save()
    assert len(read_rows(tmp_path)) == 401
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_run_that_finds_no_room_for_its_description_leaves_nothing(
    run: Callable[..., Any], tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    small_files(2000)
    with pytest.raises(ConfigError, match=r"a run cannot be written there \(.*File too large\); make room, or choose"):
        run()
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(tmp_path: Path, command: Callable[..., Any]) -> None:
    """A limit on the size of files stands for the disk; the state grows beyond it when the optimizer has its own."""
    root = Path(__file__).parents[2]
    words = ["logger=csv", "trainer.max_epochs=2", "trainer.limit_train_batches=3", "optimizer=adamw", "norm=groupnorm"]

    def limited() -> None:
        # the weights alone (320 kB) fit, with the averages of the optimizer they do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    full = subprocess.run(
        [sys.executable, str(root / "train.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=limited,
        timeout=300,
        check=False,
    )
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "00000003-validation.ckpt: it could not be written (" in full.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert not list(run.rglob("*.tmp"))
    again = command(f"resume={run}")
    assert again.returncode == 0, again.stderr
    whole = command(*words, "output_dir=whole")
    assert whole.returncode == 0
    [other] = (tmp_path / "whole").iterdir()
    assert (run / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
