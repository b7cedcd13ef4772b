"""The schema is the signature, read without importing: it must be what the import would show, and find every typo."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ablab.errors import ConfigError
from ablab.lab.config import schema
from ablab.lab.config.schema import check_config, read_signature

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def targets(node: Any) -> set[str]:
    found = set()
    if isinstance(node, dict):
        found |= {node["_target_"]} - {None, "???"} if "_target_" in node else set()
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            found |= targets(child)
    return found


NOT_INSTALLED = {"hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"}  # who wants it installs it
TARGETS = sorted(
    {t for file in CONF.rglob("*.yaml") for t in targets(OmegaConf.to_container(OmegaConf.load(file)))} - NOT_INSTALLED
)


@pytest.mark.parametrize("target", TARGETS)
def test_the_signature_that_is_read_is_the_one_that_is_imported(target: str) -> None:
    read = read_signature(target)
    imported = get_object(target)
    named, is_open = set(), True
    for part in inspect.getmro(imported)[:-1] if inspect.isclass(imported) else [imported]:
        if not is_open:  # what a class does not take as **settings, it does not pass on to its bases
            break
        if inspect.isclass(imported) and "__init__" not in vars(part):
            continue
        parameters = inspect.signature(part).parameters
        named |= {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    else:
        is_open &= not inspect.isclass(imported)  # object, the last base, takes nothing
    assert set(read.parameters) == named
    assert read.open == is_open


@pytest.mark.parametrize("target", ["ablab.norms.GrupNorm", "ablab.norm.GroupNorm", "nothing.Here", "GroupNorm"])
def test_a_target_that_does_not_exist_is_found(target: str) -> None:
    with pytest.raises(LookupError):
        read_signature(target)


@pytest.fixture
def problems(config: Callable[..., DictConfig]) -> Callable[..., str]:
    """What the check says of a config with some places changed, as a file could change them."""

    def find(*words: str, **changes: Any) -> str:
        cfg = config(*words)
        OmegaConf.set_struct(cfg, False)
        for place, value in changes.items():
            OmegaConf.update(cfg, place, value)
        with pytest.raises(ConfigError) as raised:
            check_config(cfg, CONF / "train.yaml")
        return str(raised.value)

    return find


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "sed: there is no such key; did you mean seed? the top level has: ablation, callbacks, "),
        ({"seed": "one"}, "seed=one: a whole number is needed"),
        ({"seed": 1.5}, "seed=1.5: a whole number is needed"),
        ({"name": 3}, "name=3: a text is needed"),
        ({"data.batch_size": "8x"}, "data.batch_size=8x: a whole number or full is needed"),
        ({"data.batch_size": True}, "data.batch_size=true: a whole number or full is needed"),
        ({"data.val_fraction": None}, "data.val_fraction=null: a number is needed"),
        ({"norm.momentun": 0.1}, "norm.momentun: BatchNorm takes no such argument; did you mean momentum?"),
        ({"norm": {"_target_": "ablab.norms.GroupNorm", "image_scope": "pixel"}}, "norm.image_scope=pixel: sample or "),
        ({"model.style": "cifer"}, "model.style=cifer: cifar or imagenet is needed"),
        (
            {"model.zero_init_residual": "yes please"},
            "model.zero_init_residual=yes please: true or false is needed",
        ),
        (
            {"trainer.max_epoch": 3},
            "trainer.max_epoch: Trainer takes no such argument; did you mean max_epochs?",
        ),
        ({"trainer.max_epochs": "many"}, "trainer.max_epochs=many: a whole number or null is needed"),
        ({"optimizer.momentm": 0.9}, "optimizer.momentm: SGD takes no such argument; did you mean momentum?"),
        (
            {"scheduler.warmup": 3},
            "scheduler.warmup: cosine takes no such argument; did you mean warmup_steps?",
        ),
        (
            {"norm._target_": "ablab.norms.GrupNorm"},
            "norm._target_=ablab.norms.GrupNorm: there is no class or function GrupNorm in ablab.norms",
        ),
        (
            {"callbacks.chekpoint.monitor": "x"},
            "callbacks.chekpoint: there is no such entry to change; did you mean",
        ),
        (
            {"logger.wandb.projekt": "x"},
            "logger.wandb.projekt: WandB takes no such argument; did you mean project?",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_key_or_value_is_named_with_its_place_and_remedy(
    problems: Callable[..., str], change: dict[str, Any], message: str
) -> None:
    assert message in problems(**change)


def test_all_problems_are_reported_together(problems: Callable[..., str]) -> None:
    text = problems(**{"seed": "x", "norm.momentun": 1, "model.style": "cifer"})
    assert len(text.splitlines()) == 4  # data.seed is seed
    assert {line.split(":")[0].split("=")[0] for line in text.splitlines()} == {
        "seed",
        "data.seed",
        "norm.momentun",
        "model.style",
    }


def test_a_list_and_an_optional_value_are_checked(problems: Callable[..., str]) -> None:
    text = problems("scheduler=multistep", **{"scheduler.milestones": ["a"]})
    assert text == "scheduler.milestones=['a']: a list, each item a number is needed"
    assert "data.root=3: a text or null is needed" in problems("data=cifar10", **{"data.root": 3})


def test_a_class_of_an_extra_that_is_not_installed_is_answered_with_the_extra(
    problems: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(schema.OPTIONAL, "no", "optim")
    found = problems(**{"optimizer._target_": "no.such.Lion"})
    assert "optimizer: no.such.Lion needs a package that is not there; pip install -e '.[optim]'" in found
