"""The menu of `python train.py --help`: every group with its choices, wrapped to fit a screen."""

from __future__ import annotations

import textwrap
from pathlib import Path

from omegaconf import OmegaConf


def register(conf: Path) -> None:
    """Make `${menu:}` the menu of a config folder."""
    OmegaConf.register_new_resolver("menu", lambda: menu(conf), replace=True)


def menu(conf: Path) -> str:
    groups: dict[str, list[str]] = {}
    for file in sorted(conf.rglob("*.yaml")):
        if not file.parent.name.startswith("_") and file.parent.parent.name != "hydra":  # neither is a choice of a run
            groups.setdefault(file.parent.relative_to(conf).as_posix(), []).append(file.stem)
    groups.pop(".")
    width = max(map(len, groups))
    return "\n".join(
        textwrap.fill(
            ", ".join(choices),
            width=120,
            initial_indent=f"  {group:<{width}}  ",
            subsequent_indent=" " * (width + 4),
            break_on_hyphens=False,
        )
        for group, choices in groups.items()
    )
