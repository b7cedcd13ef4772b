"""What a config may build: the kinds that its groups take, checked before anything is called."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from tests.conftest import choices
from tests.runs.test_evaluate import files_of

from ablab.errors import ConfigError
from ablab.lab.config.schema import MULTIPLE_CHOICE_GROUPS
from ablab.lab.config.trust import KINDS, check_targets, find_annotation, find_problems, kinds_of_annotation
from ablab.lab.config.yaml_files import CONF
from ablab.lab.evaluate import evaluate
from ablab.lab.run.resume import check_overrides, resume_config
from ablab.lab.train import train

Config = Callable[..., DictConfig]
Start = Callable[..., SimpleNamespace]


@pytest.fixture
def foreign(config: Config) -> Callable[..., DictConfig]:
    """A config as it comes from a run's folder, with some places changed."""

    def make(*words: str, **changes: Any) -> DictConfig:
        cfg = config(*words)
        OmegaConf.set_struct(cfg, False)
        for place, value in changes.items():
            OmegaConf.update(cfg, place.replace("__", "."), value, merge=False)
        cfg.trust = False
        return cfg

    return make


@pytest.fixture
def touched(tmp_path: Path) -> Iterator[Path]:
    """A file that a call would make; nothing has, in the end."""
    file = tmp_path / "PWNED"
    yield file
    assert not file.exists()


# Shipped choices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [*sorted(KINDS.keys() - {"trainer"}), "callbacks/measure"])
def test_every_shipped_choice_is_of_the_kind_that_its_group_takes(group: str) -> None:
    top = group.partition("/")[0]
    for choice in choices(group):
        if choice == "lightning":  # names no class, a command does
            continue
        content: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
        content.pop("defaults", None)
        parts = {top: content} if group != "task" else {name: content[name] for name in content.keys() & KINDS.keys()}
        for name, part in parts.items():
            for node in part.values() if name in MULTIPLE_CHOICE_GROUPS else [part]:
                assert list(find_problems(node, tuple(map(get_object, KINDS[name])), group, strict=True)) == []


PARENTS = {
    "data/shift": "data=digits",
    "data/augment": "data=digits",
    "norm/weight": "norm=groupnorm",
    "model/qk_norm": "model=transformer",
}


@pytest.mark.parametrize("group", PARENTS)
def test_every_shipped_choice_below_another_is_of_the_kind_that_its_parameter_takes(
    foreign: Config, group: str
) -> None:
    for choice in choices(group):
        content: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
        if "defaults" not in content:
            check_targets(foreign(PARENTS[group], **{group.replace("/", "__"): content}))


def test_shipped_strategies_experiments_and_several_callbacks_are_taken(foreign: Config) -> None:
    for words in (
        ["trainer=ddp_cpu"],
        ["trainer=fsdp"],
        ["experiment=char_lstm"],
        ["+callbacks/measure=[drift,norms]"],
    ):
        check_targets(foreign(*words))


# Foreign configs -----------------------------------------------------------------------------------------------------

COMMAND = "subprocess.getoutput"


@pytest.mark.parametrize(
    ("place", "node"),
    [
        ("callbacks.evil", {"_target_": COMMAND, "_args_": ["touch FILE"]}),
        ("callbacks.evil", {"_target_": COMMAND, "_args_": ["touch FILE"], "_partial_": True}),
        ("callbacks.evil", {"_target_": "ablab.callbacks.freeze.Freeze", "patterns": [{"_target_": COMMAND}]}),
        ("callbacks.evil", {"_target_": "ablab.callbacks.freeze.Freeze", "a": {"b": [{"_target_": COMMAND}]}}),
        ("callbacks.evil", {"_target_": "ablab.callbacks.freeze.Freeze", "_args_": [{"_target_": COMMAND}]}),
        ("callbacks.evil", {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}),
        ("callbacks.evil", {"_target_": "builtins.exec", "_args_": ["1"]}),
        ("callbacks.evil", {"_target_": 3}),
        ("callbacks.evil", {"_target_": "torch.nn.Module.load_state_dict"}),
        ("callbacks.evil", {"a": {"_target_": COMMAND}}),
        ("logger.evil", {"_target_": "pandas.read_pickle", "filepath_or_buffer": "FILE"}),
        ("model", {"_target_": "torch.jit.load", "f": "FILE"}),
        ("model", {"_target_": "torch.hub.load", "repo_or_dir": "FILE", "model": "m"}),
        ("norm", {"_target_": "ablab.norms.GroupNorm", "weight": {"_target_": COMMAND, "_args_": ["touch FILE"]}}),
        ("norm", {"_target_": "torch.nn.BatchNorm2d", "num_features": 1}),
        ("data.augment", {"_target_": "joblib.load", "filename": "FILE"}),
        ("data.shift", {"_target_": "ablab.data.augment.Augment"}),
        ("data.path", {"_target_": COMMAND}),
        ("optimizer", {"_target_": COMMAND, "_partial_": True}),
        ("scheduler", {"_target_": "functools.partial", "_args_": [{"_target_": COMMAND}]}),
        ("trainer.strategy", {"_target_": COMMAND, "_args_": ["touch FILE"]}),
        ("trainer.plugins", [{"_target_": COMMAND, "_args_": ["touch FILE"]}]),
        ("trainer.strategy", {"_target_": "ablab.lab.launch.strategies.ddp", "timeout": {"_target_": COMMAND}}),
        ("task.more", {"_target_": COMMAND, "_recursive_": False}),
        ("trainer._target_", "lightning.pytorch.Trainer"),
    ],
)
def test_a_folders_config_builds_nothing_of_another_kind(foreign: Config, touched: Path, place: str, node: Any) -> None:
    text = json.dumps(node).replace("FILE", str(touched))
    with pytest.raises(ConfigError, match=r"_target_=.*(\n|.)*trust=true \(scripts: --trust\)") as raised:
        check_targets(foreign(**{place.replace(".", "__"): json.loads(text)}))
    assert str(raised.value).startswith(place.removesuffix("._target_"))


def test_every_refused_place_is_named_at_once(foreign: Config) -> None:
    with pytest.raises(ConfigError) as raised:
        check_targets(foreign(callbacks__a={"_target_": COMMAND}, logger__b={"_target_": COMMAND}))
    assert str(raised.value).splitlines() == [
        f"callbacks.a._target_={COMMAND}: a subclass of lightning.pytorch.callbacks.callback.Callback is needed, or a "
        "function annotated to return one",
        f"logger.b._target_={COMMAND}: a subclass of lightning.pytorch.loggers.logger.Logger is needed, or a function "
        "annotated to return one",
        "  a config from a run's folder builds only these kinds; if you trust that folder as you trust code, add "
        "trust=true (scripts: --trust)",
    ]


EVIL = "import pathlib, lightning\npathlib.Path({file!r}).touch()\nclass Evil(lightning.Callback): pass\n"


@pytest.mark.parametrize("has_init", [False, True])
@pytest.mark.parametrize("where", ["runs.somebodys", "data.images", "somebodys"])
def test_a_module_beside_runs_or_data_is_not_even_imported(
    foreign: Config, touched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, has_init: bool
) -> None:
    folder = tmp_path / "project" / where.replace(".", "/")
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(EVIL.format(file=str(touched)))
    if where.endswith("somebodys"):
        (folder / "run.json").touch()
    if has_init and where.endswith("somebodys"):
        (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "project")
    with pytest.raises(ConfigError, match="its module is neither installed nor in a package"):
        check_targets(foreign(callbacks__evil={"_target_": f"{where}.evil.Evil"}))
    assert f"{where}.evil" not in sys.modules


def test_a_class_of_the_users_own_package_is_taken(
    foreign: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mine_of_trust"
    package.mkdir()
    for name in ("__init__.py", "seen.py"):
        (package / name).write_text("import lightning\nclass Seen(lightning.Callback): pass\n")
    (tmp_path / "alone_of_trust.py").write_text("import lightning\ndef seen() -> lightning.Callback: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target in ("mine_of_trust.seen.Seen", "mine_of_trust.Seen", "alone_of_trust.seen"):
        check_targets(foreign(callbacks__own={"_target_": target}))


# The user's own configs ----------------------------------------------------------------------------------------------


def test_ones_own_config_may_name_functions_without_an_annotation_but_no_other_kinds(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare_of_trust.py").write_text("def make(): ...\ndef number() -> int: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_targets(config("+callbacks.own._target_=bare_of_trust.make"))
    with pytest.raises(ConfigError) as raised:
        check_targets(config("+callbacks.own._target_=ablab.norms.NoNorm"))
    wanted = "a subclass of lightning.pytorch.callbacks.callback.Callback is needed"
    assert str(raised.value) == f"callbacks.own._target_=ablab.norms.NoNorm: {wanted}"
    cfg = config("+callbacks.own._target_=bare_of_trust.make")
    cfg.trust = False
    with pytest.raises(ConfigError, match="or a function annotated to return one"):
        check_targets(cfg)
    cfg.trust = True
    check_targets(cfg)
    cfg.trust = "yes"
    with pytest.raises(ConfigError, match="trust=yes: true, false or null is needed"):
        check_targets(cfg)


def test_the_kinds_of_an_annotation_are_those_of_its_items_without_plain_values() -> None:
    def function(a: list[Path] | None, b: Callable[..., DictConfig], c: int, d: Any, e: Nowhere) -> Path | None:  # noqa: F821
        raise NotImplementedError

    kinds = {name: kinds_of_annotation(find_annotation(function, name), items=True) for name in "abcde"}
    assert kinds == {"a": (Path,), "b": (DictConfig,), "c": (), "d": (), "e": ()}
    assert kinds_of_annotation(find_annotation(function, "return")) == (Path,)


# Every entry ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def evil(run: Start, touched: Path) -> Path:
    """A run's folder whose config names a command."""
    folder = run().folder
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    cfg.callbacks.evil = {"_target_": COMMAND, "_args_": [f"touch {touched}"]}
    cfg.trust = True  # the folder itself has no say in this
    OmegaConf.save(cfg, folder / "config.yaml")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    return folder


def reproduce(folder: Path) -> None:
    runpy.run_path(str(CONF.parent / "scripts" / "reproduce.py"), run_name="reproduce")["main"]()


def resume(folder: Path) -> None:
    train(resume_config(OmegaConf.create({"resume": str(folder), "trust": None})))


@pytest.mark.parametrize("entry", [resume, evaluate, reproduce])
def test_a_folder_that_names_a_command_is_refused_wherever_it_is_read(
    evil: Path, monkeypatch: pytest.MonkeyPatch, entry: Callable[[Path], Any]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", str(evil)])
    before = files_of(evil)
    with pytest.raises(ConfigError, match=rf"callbacks\.evil\._target_={COMMAND}: "):
        entry(evil)
    assert files_of(evil) == before


def test_trust_is_the_commands_own(evil: Path) -> None:
    cfg = resume_config(OmegaConf.create({"resume": str(evil), "trust": True}))
    assert cfg.trust is True
    check_targets(cfg)
    assert resume_config(OmegaConf.create({"resume": str(evil), "trust": None})).trust is False


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "a ${seed}", "${hydra:runtime.cwd}", "${oc.decode:'1'}"])
def test_a_folders_config_is_not_resolved(run: Start, value: str) -> None:
    folder = run().folder
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("name: run", f"name: {json.dumps(value)}"))
    with pytest.raises(ConfigError, match=r"its config\.yaml has name=.*, which is not resolved"):
        evaluate(folder)


@pytest.mark.parametrize("word", ["name=${oc.env:HOME}", "hydra.searchpath=[file:///tmp]", "+hydra/launcher=slurm"])
def test_recorded_words_are_not_evaluated_here(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=r"in its run\.json would be evaluated here"):
        check_overrides(tmp_path, ["seed=1", word])
