"""The cells of a sweep read equal data once, and find what they would find with data of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from ablab.data.reading import read_once
from ablab.lab.train import build_data

ROOT = Path(__file__).parents[2]


def test_what_is_shared_is_what_would_have_been_read(
    config: Callable[..., DictConfig], data_words: Callable[[str], list[str]], data_choice: str
) -> None:
    words = data_words(data_choice)
    one = config(*words)
    another = config(*words, "seed=7", "data.batch_size=4", "data.micro_batch_size=2")
    with read_once():
        first, shared = build_data(one), build_data(another)
    own = build_data(another)
    assert shared.splits is first.splits
    assert shared.splits is not own.splits
    assert vars(shared).keys() == vars(own).keys()
    assert (shared.record(), shared.names(), shared.model_sizes) == (own.record(), own.names(), own.model_sizes)
    assert repr(shared.task_sizes) == repr(own.task_sizes)
    for ours, theirs in zip(shared.example(1), own.example(1), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_data_are_read_anew_for_other_settings_and_outside_a_sweep(config: Callable[..., DictConfig]) -> None:
    cfg, other = config(), config("data.split_seed=1")
    with read_once():
        first, second, third = build_data(cfg), build_data(other), build_data(cfg)
        assert first.fingerprint == third.fingerprint != second.fingerprint
        assert first.splits is not third.splits  # only the newest is kept
        with read_once():
            assert build_data(cfg).splits is third.splits
        assert build_data(cfg).splits is third.splits
    assert build_data(cfg).splits is not third.splits


def test_data_are_read_anew_once_a_file_changes(config: Callable[..., DictConfig], tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(3000))
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "a.txt").write_text(text)
    cfg = config("data=text", "model=transformer", f"data.path={tmp_path}/txt")
    with read_once():
        first = build_data(cfg)
        assert build_data(cfg).splits is first.splits
        (tmp_path / "txt" / "a.txt").write_text(text[::-1])  # as long as before
        os.utime(tmp_path / "txt" / "a.txt", ns=(10**18, 10**18))
        second = build_data(cfg)
        assert second.fingerprint != first.fingerprint
        (tmp_path / "txt" / "b.txt").write_text("one file more")
        third = build_data(cfg)
        assert third.fingerprint != second.fingerprint
        (tmp_path / "txt" / ".hidden").write_text("not read")
        assert build_data(cfg).splits is third.splits


def test_data_are_read_anew_once_an_image_changes_that_a_table_points_to(
    config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    (tmp_path / "table").mkdir()
    for split in ("train", "test"):
        for i in range(20):
            Image.new("RGB", (4, 4), (i, len(split), 0)).save(tmp_path / f"{split}{i}.png")
        rows = {"image": [f"../{split}{i}.png" for i in range(20)], "label": [0, 1] * 10}
        parquet.write_table(pyarrow.table(rows), tmp_path / "table" / f"{split}.parquet")
    cfg = config("data=hf_image", f"data.root={tmp_path}/table", "data.batch_size=4", "data.val_fraction=0.2")
    with read_once():
        first = build_data(cfg)
        assert build_data(cfg).splits is first.splits
        Image.new("RGB", (4, 4), (200, 0, 0)).save(tmp_path / "test3.png")
        os.utime(tmp_path / "test3.png", ns=(10**18, 10**18))
        assert build_data(cfg).fingerprint != first.fingerprint


def test_a_batch_that_is_too_large_for_shared_data_is_refused(config: Callable[..., DictConfig]) -> None:
    with read_once():
        build_data(config())
        with pytest.raises(ValueError, match="batch_size=5000 is more than the 1149 training samples"):
            build_data(config("data.batch_size=5000"))


def test_runs_that_share_their_data_find_the_same_bits_and_leave_the_data_as_they_were(
    run: Callable[..., SimpleNamespace], config: Callable[..., DictConfig]
) -> None:
    def weights(done: SimpleNamespace) -> Any:
        return json.loads((done.folder / "run.json").read_text())["weights_sha256"]

    cells = [["seed=0"], ["seed=1"], ["seed=1", "data.batch_size=8"], ["seed=0", "norm=groupnorm"]]
    words = ["data/augment=crop_flip", "data/shift=gaussian_noise"]
    with read_once():
        shared = [weights(run(*words, *cell)) for cell in cells]
        data = build_data(config(*words))
    assert shared == [weights(run(*words, *cell)) for cell in cells]
    assert data.splits is not None
    fresh = build_data(config(*words))
    assert fresh.splits is not None
    for part in ("train", "val", "test"):
        assert getattr(data.splits, part).digest() == getattr(fresh.splits, part).digest()


def test_the_cells_of_a_sweep_read_their_data_once(command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(
        "from typing import Any\n"
        "from ablab.data.digits import Digits\n"
        "class Counted(Digits):\n"
        "    def __init__(self, **settings: Any) -> None:\n"
        "        super().__init__(**settings)\n"
        "    def load(self):\n"
        f"        open({str(tmp_path / 'readings')!r}, 'a').write('read\\n')\n"
        "        return super().load()\n"
    )
    words = ["-m", "trainer=smoke", "logger=csv", "data._target_=counted.Counted", "name=once"]
    grid = ["norm=none", "data.batch_size=8,16", "seed=0,1"]
    done = command(*words, *grid, PYTHONPATH=f"{tmp_path}:{ROOT / 'src'}")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "once").glob("*/run.json"))) == 4
    assert (tmp_path / "readings").read_text() == "read\n"
