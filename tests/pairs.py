"""Models with the data and the norms that go with them: which pairs are defined, and which of them are tested.

The norms come from the YAMLs. Of a norm that the tables below do not know, its own statistics say where it is defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tests.conftest import choices
from tests.norms.conftest import NAMED, chosen

from ablab.norms import Layout, WeightStandardization

OVER_POSITIONS_ALONE = {"instancenorm", "frn", "evonorm_b0"}  # each feature of a single position is a single value
OVER_POSITIONS = OVER_POSITIONS_ALONE | {
    "batchnorm",
    "batchnorm_weightnorm",
    "batchrenorm",
    "fastbatchnorm",
    "evonorm_s0",
    "ghostbatchnorm",
    "groupnorm",
    "meanonlybatchnorm",
    "syncbatchnorm",
    "weightnorm_meanonlybatchnorm",
}
OF_CONVOLUTIONS = {"groupnorm_weightstandardization"}
# (model, kind of data) -> norms that are not defined there
UNDEFINED = {
    ("rnn", "sequences"): {"instancenorm", "frn"} | OF_CONVOLUTIONS,
    ("rnn", "text"): {"instancenorm", "frn"} | OF_CONVOLUTIONS,
    ("transformer", "sequences"): OF_CONVOLUTIONS,
    ("transformer", "text"): OVER_POSITIONS | OF_CONVOLUTIONS,
    ("mlp", "vectors"): OVER_POSITIONS_ALONE | OF_CONVOLUTIONS,
    # digits of 8x8 are down to one pixel after the 7x7 stem, the pool and two stages
    ("resnet18", "images"): OVER_POSITIONS_ALONE,
    ("resnet50", "images"): OVER_POSITIONS_ALONE,
}
PAIRS = [
    ("resnet", "images"),
    ("unet", "masks"),
    ("transformer", "sequences"),
    ("transformer", "text"),
    ("mlp", "vectors"),
    ("rnn", "sequences"),
    ("rnn", "text"),
]


def defined(model: str, kind: str, norm: str) -> bool:
    """Return whether a norm is defined in all places of a model of some kind of data."""
    if norm in NAMED:
        return norm not in UNDEFINED.get((model, kind), set())
    return declared(model, kind, norm)


def declared(model: str, kind: str, choice: str) -> bool:
    """Return whether a norm says, by its statistics, that it is defined in all places of a model."""
    norm = chosen(choice)
    if isinstance(norm.weight, WeightStandardization) and kind not in ("images", "masks"):
        return False
    layouts: dict[str, Layout] = {"images": "image", "masks": "image", "vectors": "vector"}
    layout = layouts.get(kind, "recurrence" if model == "rnn" else "sequence")
    taken = [statistic for statistic in norm.statistics(layout) if statistic.source != "stored"]
    if (model, kind) == ("transformer", "text") and any(statistic.positions for statistic in taken):
        return False
    one_position = model in ("rnn", "resnet18", "resnet50")
    return not any(s.features == "each" and not s.batch and (one_position or not s.positions) for s in taken)


def in_turn(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Return model, kind and norm of all defined pairs; each norm is tested with two models, in turn.

    The others are marked thorough.
    """
    found = []
    for number, norm in enumerate(choices("norm")):
        its_pairs = [pair for pair in pairs if defined(*pair, norm)]
        tested = {(2 * number + k) % len(its_pairs) for k in range(2)} if its_pairs else set()
        for i, pair in enumerate(its_pairs):
            found.append(pytest.param(*pair, norm, marks=[pytest.mark.thorough] * (i not in tested)))
    return found
