"""A YAML file that cannot be used is refused with its name, the line and the remedy, whatever is wrong with it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ablab.errors import ConfigError
from ablab.lab.config import errors, yaml_files
from ablab.lab.config.errors import readable_errors
from ablab.lab.config.yaml_files import CONF, check_conf, check_yaml, read_yaml

NAMES = "abcdefgh"
LAUGH = [
    "a: &a [1,1,1,1,1,1,1,1,1,1]",
    *(f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]" for before, name in pairwise(NAMES)),
]
# What an experiment has below its `# @package _global_`, the line that is named, and what is said of it.
BAD: dict[str, tuple[bytes, int, str]] = {
    "bracket": (b"optimizer: {lr: 0.1\n", 2, "while parsing a flow mapping, .*; close brackets and quotes"),
    "quote": (b"name: 'a\nseed: 1\n", 2, "close brackets and quotes"),
    "colon": (b"name: a\noptimizer: lr: 0.1\n", 3, "mapping values are not allowed"),
    "indent": (b"optimizer:\n  lr: 0.1\n momentum: 0.9\n", 4, "indent with spaces"),
    "tab": (b"optimizer:\n\tlr: 0.1\n", 3, "a tab indents it; use spaces"),
    "twice": (b"seed: 1\nseed: 2\n", 3, "the key seed is there twice; keep one"),
    "twice_below": (b"optimizer:\n  lr: 1\n  momentum: 0\n  lr: 2\n", 5, "the key lr is there twice"),
    "latin1": (b"name: caf\xe9\n", 2, "byte 0xe9 is not UTF-8; save the file as UTF-8"),
    "tag": (b'name: !!python/object/apply:os.system ["true"]\n', 2, "its tag !!python/object/apply:os.system names no"),
    "own_tag": (b"name: !mine 3\n", 2, "its tag !mine names no plain data; leave the tag out"),
    "list": (b"- seed\n- name\n", 2, r"keys are needed at the top \(key: value\)"),
    "list_of_mappings": (b"- seed: 1\n", 2, r"keys are needed at the top \(key: value\)"),
    "text": (b"hello\n", 2, r"keys are needed at the top \(key: value\)"),
    "number": (b"17\n", 2, r"keys are needed at the top \(key: value\)"),
    "contains_itself": (b"name: &a\n  b: *a\n", 3, r"\*a is part of what it stands for"),
    "aliases": (
        "\n".join(LAUGH).encode(),
        5,
        r"its aliases \(\*name\) stand for more than 10,000 values",
    ),
    "unknown_alias": (b"name: *nobody\n", 2, r"\*nobody stands for nothing; define it above"),
    "list_as_key": (b"? [1, 2]\n: 3\n", 2, "a key is a list or a mapping; a text is needed"),
    "two_documents": (b"seed: 1\n---\nseed: 2\n", 3, "a second document begins"),
    "control_character": (b"seed: 1\nname: a\x00b\n", 3, "control characters are not allowed|special characters"),
    "deep": (b"name: " + b"[" * 3000, 2, "it is nested more than 100 levels deep"),
}
HEADER = b"# @package _global_\n"


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ that a test may break."""
    copied = Path(shutil.copytree(CONF, tmp_path / "conf"))
    for module in (errors, yaml_files):
        monkeypatch.setattr(module, "CONF", copied)
    return copied


def composed(conf: Path, *words: str) -> DictConfig:
    """The config of a command, as train.py composes it."""
    GlobalHydra.instance().clear()
    with readable_errors(), initialize_config_dir(str(conf), version_base="1.3"):
        check_conf(conf)
        return compose("train", list(words))


@pytest.fixture
def answer(conf: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said of an experiment that must be refused."""

    def find(name: str) -> str:
        with pytest.raises(SystemExit) as left:
            composed(conf, f"experiment={name}")
        assert left.value.code == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        return said

    return find


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_named_with_the_line_and_the_remedy(tmp_path: Path, name: str) -> None:
    content, line, problem = BAD[name]
    file = tmp_path / f"{name}.yaml"
    file.write_bytes(HEADER + content)
    with pytest.raises(ConfigError, match=f"{name}.yaml, line {line}: .*({problem})"):
        check_yaml(file)
    with pytest.raises(ConfigError, match=f"{name}.yaml, line {line}: .*({problem})"):
        read_yaml(file)


@pytest.mark.parametrize("name", BAD)
def test_hydras_own_error_for_such_a_file_is_one_message(answer: Callable[..., str], conf: Path, name: str) -> None:
    content, line, problem = BAD[name]
    (conf / "experiment" / f"{name}.yaml").write_bytes(HEADER + content)
    assert re.match(rf"error: conf/experiment/{name}\.yaml, line {line}: .*({problem})", answer(name))


def test_a_byte_order_mark_is_refused_because_hydra_would_miss_the_package(
    answer: Callable[..., str], conf: Path
) -> None:
    (conf / "experiment" / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + HEADER + b"seed: 1\n")
    assert answer("marked").startswith("error: conf/experiment/marked.yaml, line 1: it begins with a byte order mark")


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "defaults: [a]"}, "conf/experiment/a.yaml -> conf/experiment/a.yaml"),
        ({"a": "defaults: [b, _self_]", "b": "defaults: [/experiment/a]"}, "b.yaml -> conf/experiment/a.yaml"),
    ],
)
def test_defaults_that_go_in_a_circle_are_named(
    answer: Callable[..., str], conf: Path, files: dict[str, str], circle: str
) -> None:
    for name, content in files.items():
        (conf / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{content}\n")
    said = answer("a")
    assert "its defaults go in a circle" in said
    assert circle in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("defaults: 3", "error: conf/experiment/odd.yaml: it cannot be read .*defaults must be a list"),
        ("defaults: [[1]]", "error: conf/experiment/odd.yaml: it cannot be read .*Unsupported type in defaults"),
        (f"seed: {'1' * 5000}", "error: conf/experiment/odd.yaml: it cannot be read .*4300 digits"),
        ("name: ${", r"error: name: its \$\{…\} cannot be read .*; a text that has \$\{ in it is written \\\$\{"),
    ],
)
def test_what_only_hydra_knows_is_said_with_the_place(
    answer: Callable[..., str], conf: Path, content: str, message: str
) -> None:
    (conf / "experiment" / "odd.yaml").write_text(f"# @package _global_\n{content}\n")
    assert re.match(message, answer("odd"))


def test_anchors_merge_keys_and_plain_tags_stay_legal(tmp_path: Path) -> None:
    file = tmp_path / "plain.yaml"
    file.write_text("a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, z: !!str 3}\n? key\n: &s text\nd: [*s, *s]\n")
    assert read_yaml(file).c == {"x": 1, "y": [1, 2], "z": "3"}
    file.write_text("")
    check_yaml(file)
    file.write_text("# only a comment\n")
    check_yaml(file)
    file.write_text("tags: [" + ", ".join(map(str, range(20_000))) + "]\n")
    check_yaml(file)


def test_every_file_of_conf_is_fine() -> None:
    check_conf()
    for file in CONF.rglob("*.yaml"):
        check_yaml(file)


def test_a_broken_file_that_nothing_uses_is_nobodys_error(conf: Path) -> None:
    (conf / "experiment" / "draft.yaml").write_bytes(b"a: [1\nb: caf\xe9\n")
    assert composed(conf).seed == 0
