"""Damaged records of a run: one message with the file and the key, wherever they are read, and nothing is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from tests.runs.test_evaluate import files_of

from ablab.errors import ConfigError
from ablab.lab.evaluate import evaluate
from ablab.lab.run.compare import check_comparable
from ablab.lab.run.folder import read_config, read_environment, read_record
from ablab.lab.run.resume import resume_config
from ablab.lab.train import train

RECORD: dict[str, Any] = {
    "id": "abcdefgh",
    "status": "stopped",
    "overrides": ["seed=1"],
    "processes": 1,
    "git_commit": None,
    "identity": {"run": "a", "config": "b", "code": "c", "data": "d"},
    "batch_sizes": {"norm": 8},
    "data": {"fingerprint": "f"},
    "metrics": {"test/loss": 1, "test/accuracy": None},
}
ENVIRONMENT: dict[str, Any] = {
    "python": "3.11",
    "processor": "x",
    "threads": {"torch": 1, "interop": 1},
    "accelerators": [],
    "cuda": None,
    "cudnn": None,
    "driver": None,
    "packages": {"torch": "2"},
}


def changed(content: dict[str, Any], key: str, value: Any) -> str:
    """JSON with another value at a key, `data.fingerprint` for example."""
    copy = json.loads(json.dumps(content))
    *parents, last = key.split("/")
    node = copy
    for parent in parents:
        node = node[parent]
    node[last] = value
    return json.dumps(copy)


def test_records_as_runs_write_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    assert read_record(tmp_path) == RECORD
    assert read_environment(tmp_path) == ENVIRONMENT


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("status", 3, "status=3, and running or finished or stopped or .* is needed"),
        ("status", "paused", 'status="paused", and running or'),
        ("identity", ["a"], r'identity=\["a"\], and a mapping is needed|it lacks identity'),
        ("identity/code", 3, "identity.code=3, and a text is needed"),
        ("metrics", "good", 'metrics="good", and a mapping is needed'),
        ("processes", "two", 'processes="two", and a whole number is needed'),
        ("processes", 0, "processes=0, and 1 to 1,000,000 is needed"),
        ("processes", 10**40, "processes=1000"),
        ("overrides", "seed=1", 'overrides="seed=1", and a list, each item a text or null is needed'),
        ("overrides", [1], r"overrides=\[1\], and"),
        ("batch_sizes/norm", None, "batch_sizes.norm=null, and a whole number is needed"),
        ("data", {}, "it lacks data.fingerprint"),
        ("id", ["a"], r'id=\["a"\], and a text is needed'),
        ("git_commit", 3, "git_commit=3, and a text or null is needed"),
        ("pid", "x", 'pid="x", and a whole number is needed'),
    ],
)
def test_a_value_of_another_type_in_run_json_is_named(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    (tmp_path / "run.json").write_text(changed(RECORD, key, value))
    with pytest.raises(ConfigError, match=rf"its run\.json is not what a run writes \({problem}"):
        read_record(tmp_path)


def test_a_metric_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**RECORD, "metrics": {"test/loss": "low"}}))
    with pytest.raises(ConfigError, match=r'metrics\.test/loss="low", and a number or null is needed'):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("threads", None, "it lacks threads.torch|threads=null, and a mapping is needed"),
        ("threads/torch", "1", 'threads.torch="1", and a whole number is needed'),
        ("threads/torch", 10**9, "threads.torch=1000000000, and 1 to 4,096 is needed"),
        ("packages", [], r"packages=\[\], and a mapping is needed"),
        ("packages/torch", 2, "packages.torch=2, and a text is needed"),
        ("accelerators", "none", 'accelerators="none", and a list is needed'),
    ],
)
def test_a_value_of_another_type_in_environment_json_is_named(
    tmp_path: Path, key: str, value: Any, problem: str
) -> None:
    (tmp_path / "environment.json").write_text(changed(ENVIRONMENT, key, value))
    with pytest.raises(ConfigError, match=rf"its environment\.json is not what a run writes \({problem}"):
        read_environment(tmp_path)


TEXT = json.dumps(RECORD)
BROKEN = {
    "cut": (TEXT[:50].encode(), "cannot be read"),
    "empty": (b"", "cannot be read"),
    "latin1": (TEXT.replace("abc", "\xe9").encode("latin-1"), "cannot be read .*utf-8"),
    "nan": (TEXT.replace("8", "NaN").encode(), "its number NaN is not finite"),
    "infinite": (TEXT.replace("8", "1e999").encode(), "its number 1e999 is not finite"),
    "digits": (TEXT.replace("8", "8" * 5000).encode(), "cannot be read .*4300"),
    "twice": (TEXT.replace('"processes"', '"status"').encode(), "its key status is there twice"),
    "deep": (b"[" * 100_000, "cannot be read .*recursion"),
    "list": (b"[1, 2]", "is not what a run writes .it lacks"),
    "number": (b"3", "is not what a run writes .it lacks"),
    "null": (b"null", "is not what a run writes .it lacks"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_is_no_such_json_is_named(tmp_path: Path, name: str) -> None:
    content, problem = BROKEN[name]
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{tmp_path}: its run\.json .*{problem}"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seed: 0", "seed: [0]", r"seed=\[0\], and a whole number is needed"),
        ("callbacks:", "callbacks: 3\nmore:", "callbacks=3, and a mapping is needed"),
        ("seed: 0", "seed: 0\nseed: 1", r"config\.yaml, line \d+: the key seed is there twice"),
        ("seed: 0", "seed: 0\n\ta: 1", r"config\.yaml, line \d+: a tab indents it"),
        ("name: run", "name: !!python/object/apply:os.system [true]", "names no plain data"),
    ],
)
def test_every_reader_of_a_damaged_folder_gives_one_message_and_writes_nothing(
    finished: Path, old: str, new: str, problem: str
) -> None:
    file = finished / "config.yaml"
    text = file.read_text()
    try:
        file.write_text(re.sub(rf"^{old}", new, text, count=1, flags=re.MULTILINE))
        before = files_of(finished)
        for reader in (read_config, evaluate, check_comparable, resume):
            with pytest.raises(ConfigError, match=problem):
                reader(finished)
        assert files_of(finished) == before
    finally:
        file.write_text(text)


@pytest.fixture
def finished(run: Callable[..., SimpleNamespace]) -> Path:
    return run().folder


def resume(folder: Path) -> None:
    train(resume_config(OmegaConf.create({"resume": str(folder), "trust": None})))


def test_records_of_other_types_stop_every_reader(finished: Path) -> None:
    for name, key, value in (("run.json", "status", 3), ("environment.json", "threads", None)):
        file = finished / name
        text = file.read_text()
        file.write_text(changed(json.loads(text), key, value))
        before = files_of(finished)
        for reader in (evaluate, check_comparable, resume):
            with pytest.raises(ConfigError, match=rf"its {name} is not what a run writes"):
                reader(finished)
        assert files_of(finished) == before
        file.write_text(text)
