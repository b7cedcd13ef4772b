"""The schemas for editors: they accept every file of conf/, and find what the config check would find."""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from ablab.lab.config.json_schema import build_schemas

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
FILES = sorted(file.relative_to(CONF) for file in CONF.rglob("*.yaml"))


@cache
def validator(name: str) -> Draft7Validator:
    schema = build_schemas(CONF)[name]
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def problems(name: str, text: str) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(yaml.safe_load(text) or {})]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_of_conf_is_valid(file: Path) -> None:
    name = ".".join(file.parent.parts) or "train"
    assert problems(name, (CONF / file).read_text()) == []


MISTAKES = [
    ("norm", "_target_: ablab.norms.GroupNorm\nnum_group: 4", "num_group"),
    ("norm", "_target_: ablab.norms.GroupNorm\nnum_groups: four", "four"),
    ("norm", "_target_: ablab.norms.GroupNorm\nimage_scope: pixel", "pixel"),
    ("norm", "_target_: ablab.norms.BatchNorm\nnum_groups: 4", "num_groups"),  # another norm's
    ("norm", "_target_: ablab.norms.BatchNorm\nweight: {gamma: 1}", "gamma"),
    ("model", "_target_: ablab.models.rnn.RNN\ncell: lstn", "lstn"),
    ("model", "hiden_size: 3", "hiden_size"),  # of a file that builds upon another
    ("data", "defaults: [digits, _self_]\nval_fracton: 0.2", "val_fracton"),
    ("data", "batch_size: half", "half"),
    ("data", "augment: {crop_paddin: 4}", "crop_paddin"),
    ("data.augment", "flip: yes please", "yes please"),
    ("data._base", "num_worker: 2", "num_worker"),
    ("optimizer", "_target_: torch.optim.SGD\nlr: 0.1\nmomentm: 0.9", "momentm"),
    ("optimizer", "_target_: torch.optim.AdamW\nbetas: [0.9]", "0.9"),
    ("scheduler", "_target_: ablab.optim.schedules.cosine\nwarmup_steps: 0.5", "0.5"),
    ("trainer", "defaults: [gpu, _self_]\nmax_epoch: 3", "max_epoch"),
    ("trainer", "max_epochs: many", "many"),
    ("callbacks", "checkpoints: {kep: 2}", "checkpoints"),
    ("callbacks.measure", "drift: {every_n_step: 3}", "drift"),
    ("logger", "wandb: {mode: 3}", "wandb"),
    ("task", "task: {label_smoothin: 0.1}", "label_smoothin"),
    ("experiment", "sed: 1", "sed"),
    ("experiment", "model: {hiden_size: 3}", "hiden_size"),
    ("experiment", "trainer: {max_epochs: many}", "many"),
    ("ablation", "ablation: {factor: {norm: [batchnorm]}}", "ablation"),
    ("train", "seed: one", "one"),
]


@pytest.mark.parametrize(("name", "text", "named"), MISTAKES, ids=[text for _, text, _ in MISTAKES])
def test_a_misspelt_key_and_a_wrong_type_are_found(name: str, text: str, named: str) -> None:
    found = problems(name, text)
    assert len(found) == 1
    assert named in found[0]


def test_what_stands_for_a_value_is_a_value_of_every_type() -> None:
    assert problems("data", "batch_size: ${other.size}\nseed: ???") == []
    assert problems("experiment", "optimizer: {lr: '${eval:3}'}\nmonitor: {metric: '???'}") == []


def test_a_class_that_is_newer_than_the_schema_may_be_given_anything() -> None:
    assert problems("norm", "_target_: ablab.norms.MyNorm\nstrength: 3") == []
    assert problems("experiment", "defaults: [override /norm: mine]\nnorm: {_target_: mine.Norm, strength: 3}") == []


def test_arguments_are_described_by_their_docstring_and_else_by_the_comment_in_the_file() -> None:
    definitions = build_schemas(CONF)["norm"]["definitions"]
    group_norm = definitions["norm:ablab.norms.GroupNorm"]["properties"]
    assert group_norm["num_groups"]["description"].startswith("the features are split into this many groups")
    assert group_norm["affine"]["description"] == "learn gamma and beta"


def test_editors_are_told_which_files_each_schema_is_for() -> None:
    told: dict[str, str] = json.loads((ROOT / ".vscode" / "settings.json").read_text())["yaml.schemas"]
    for file in FILES:
        name = ".".join(file.parent.parts) or "train"
        matching = [schema for schema, pattern in told.items() if fnmatch(f"/conf/{file}", pattern)]
        assert f"./.schema/{name}.json" in matching, f"conf/{file}: .vscode/settings.json has no line for its folder"


def test_the_script_writes_schemas_that_check_jsonschema_reads(tmp_path: Path) -> None:
    def program(*words: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)

    written = program("scripts/schema.py", "--to", tmp_path)
    assert (written.returncode, written.stderr) == (0, "")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("_target_: ablab.norms.GroupNorm\nnum_group: 4\n")
    check = ["-m", "check_jsonschema", "--schemafile", tmp_path / "norm.json"]
    assert program(*check, *CONF.glob("norm/*.yaml")).returncode == 0
    refused = program(*check, wrong)
    assert refused.returncode == 1
    assert "'num_group' was unexpected" in refused.stdout
