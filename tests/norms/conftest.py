"""What the norms' tests share: every YAML of conf/norm as an object, and inputs of every layout."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.lab.config.build import build
from ablab.norms import EvoNormS0, GroupNorm, LayerNorm, Layout, Norm, RMSNorm, UndefinedNorm, collect_refusals

ROOT = Path(__file__).parents[2]
FEATURES = 16  # two of them in each of the eight groups that are the default
SHAPES: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "image 1d": ("image", (4, FEATURES, 6)),
    "image": ("image", (4, FEATURES, 3, 5)),
    "image channels_last": ("image", (4, FEATURES, 3, 5)),
    "image 3d": ("image", (4, FEATURES, 2, 3, 2)),
    "sequence": ("sequence", (4, 6, FEATURES)),
    "heads": ("heads", (4, 2, 6, FEATURES)),
    "vector": ("vector", (4, FEATURES)),
    "recurrence": ("recurrence", (4, FEATURES)),
    "recurrence, all steps": ("recurrence", (4, 6, FEATURES)),
}


@functools.cache
def norm_node(choice: str) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(f"norm/{choice}").norm


# Norms that the page names; of others, which somebody has added, only what holds of every norm is asked.
NAMED = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "norms.md").read_text(), re.MULTILINE))

# scopes that no YAML has
SCOPES: dict[str, Norm] = {
    "groupnorm at positions": GroupNorm(num_groups=8, image_scope="position", sequence_scope="position"),
    "layernorm, the other scopes": LayerNorm(image_scope="position", sequence_scope="sample"),
    "rmsnorm, the other scopes": RMSNorm(image_scope="position", sequence_scope="sample"),
    "evonorm_s0 at positions": EvoNormS0(num_groups=8, image_scope="position", sequence_scope="position"),
}


SETTINGS = [*sorted(file.stem for file in (ROOT / "conf/norm").glob("*.yaml")), *SCOPES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of a `setting` go through every choice of conf/norm, and through the scopes that no choice has."""
    listed = [name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0]]
    if "setting" in metafunc.fixturenames and "setting" not in listed:
        metafunc.parametrize("setting", SETTINGS)


def chosen(setting: str) -> Norm:
    """A choice of conf/norm, exactly as its YAML has it, or one of `SCOPES`."""
    return copy.deepcopy(SCOPES[setting]) if setting in SCOPES else build(norm_node(setting))


@pytest.fixture
def norm(setting: str) -> Norm:
    return chosen(setting)


def make(norm: Norm, shape: str, activation: nn.Module | None = None, features: int = FEATURES) -> nn.Module:
    """The norm's layer for a shape of `SHAPES`, its parameters drawn at random."""
    layout, _ = SHAPES[shape]
    with collect_refusals():
        if layout == "recurrence":
            layer = norm.recurrent(features, "cell", num_steps=6)
        else:
            layer = norm(features, layout, activation=activation)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.2)
    return layer


def defined(layer: nn.Module) -> bool:
    return not isinstance(layer, UndefinedNorm)


def inputs(shape: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    _, size = SHAPES[shape]
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    x = x.to(dtype)
    return x.to(memory_format=torch.channels_last) if "channels_last" in shape else x


def call(layer: nn.Module, x: Tensor, shape: str, valid: Tensor | None = None) -> Tensor:
    """The layer's output; a single time step is the third."""
    return layer(x, valid, 2) if shape == "recurrence" else layer(x, valid)


def twin(layer: nn.Module) -> nn.Module:
    """The same layer with a state of its own."""
    return copy.deepcopy(layer)
