"""The menu of `python train.py --help`: every group with its choices, wrapped to fit the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

MIN_WIDTH, MAX_WIDTH = 80, 120  # columns


def register(conf: Path) -> None:
    """Make `${menu:…}` the menu of a config folder, with the groups that it names first."""
    OmegaConf.register_new_resolver(
        "menu", lambda *first, _root_: format_menu(conf, first, _root_.hydra.runtime.choices), replace=True
    )


def format_menu(conf: Path, first: tuple[str, ...], chosen: Mapping[str, Any]) -> str:
    """A paragraph for each group; a star marks the choice that a run without further words has.

    Args:
        conf: the config folder.
        first: the groups that come first, each with those within it; the others follow by the alphabet.
        chosen: the choice of each group, where Hydra may have written the place of its node behind an @.
    """
    groups: dict[str, list[str]] = {}
    for file in sorted(conf.rglob("*.yaml")):
        if not file.parent.name.startswith("_") and file.parent.parent.name != "hydra":  # neither is a choice of a run
            groups.setdefault(file.parent.relative_to(conf).as_posix(), []).append(file.stem)
    groups.pop(".")
    stars = {(group.partition("@")[0], choice) for group, choice in chosen.items()}
    width = sorted(map(len, groups))[-2]  # the longest alone sticks out
    columns = min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)
    outer = [*first, *sorted(groups)]
    return "\n".join(
        textwrap.fill(
            ", ".join(f"{choice}*" if (group, choice) in stars else choice for choice in groups[group]),
            width=columns,
            initial_indent=f"  {group:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
        for group in sorted(groups, key=lambda group: (outer.index(group.partition("/")[0]), group))
    )
