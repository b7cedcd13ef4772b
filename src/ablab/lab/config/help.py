"""The menu of `python train.py --help`: every group with its choices, wrapped to the width of the terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

MIN_WIDTH, MAX_WIDTH = 80, 120  # columns


def register(conf: Path) -> None:
    """Register the resolver `${menu:…}`, which lists the groups of a config folder; its arguments come first."""
    OmegaConf.register_new_resolver(
        "menu", lambda *first, _root_: format_menu(conf, first, _root_.hydra.runtime.choices), replace=True
    )


def format_menu(conf: Path, first: tuple[str, ...], chosen: Mapping[str, Any]) -> str:
    """Return a paragraph for each group; a star marks the default choice.

    Args:
        conf: the config folder.
        first: the groups to list first, each with its nested groups; the others follow alphabetically.
        chosen: the choice of each group; Hydra may append @ and the path of its node to a group.
    """
    groups: dict[str, list[str]] = {}
    for file in sorted(conf.rglob("*.yaml")):
        # shared parts and Hydra's own groups are no choices of a run
        if not file.parent.name.startswith("_") and file.parent.parent.name != "hydra":
            groups.setdefault(file.parent.relative_to(conf).as_posix(), []).append(file.stem)
    groups.pop(".")
    stars = {(group.partition("@")[0], choice) for group, choice in chosen.items()}
    width = sorted(map(len, groups))[-2]  # the longest name may stick out
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
