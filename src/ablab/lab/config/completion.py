"""Shell completion: Hydra's own, and what it has no answer to.

Hydra knows groups, choices and keys. Paths (resume=runs/), the words that an argument takes (model.cell=), the later
choices of a sweep (norm=batchnorm,gr) and the options with dashes are completed here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.plugins.completion_plugin import CompletionPlugin
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf

from ablab.lab.config.json_schema import schema_of_type
from ablab.lab.config.schema import read_signature, show

Query = Callable[[CompletionPlugin, str | None, str], list[str]]
HIDDEN_PREFIXES = ("hydra", "cell")  # not for somebody who has typed nothing yet
PATH_SUFFIXES = ("dir", "file", "folder", "path", "root")  # how the names of keys end that hold one

hydra_query: Query = CompletionPlugin._query


def register() -> None:
    """Have Hydra's completion of every shell answer so."""
    CompletionPlugin._query = query  # type: ignore[method-assign, assignment]


def query(plugin: CompletionPlugin, config_name: str | None, line: str) -> list[str]:
    """What the last word of a command line may become; nothing where the words before it are wrong.

    Args:
        plugin: the shell's.
        config_name: the root config's.
        line: what has been typed behind `train.py`.
    """
    *words, word = [*line.split(), *([""] if line.endswith(" ") or not line else [])]
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stderr(nowhere),
    ):  # a person who is typing wants no message yet
        try:
            return sorted(completions(plugin, config_name, shlex.split(" ".join(words)), word))
        except (Exception, SystemExit):  # of Hydra's parser, a class that cannot be imported, a folder that is closed
            return []


def completions(plugin: CompletionPlugin, config_name: str | None, words: list[str], word: str) -> list[str]:
    options = {name: action for action in get_args_parser()._actions for name in action.option_strings}
    if words and words[-1] in options and (choices := options[words[-1]].choices):
        return [choice for choice in choices if choice.startswith(word)]
    if word.startswith("-"):
        return [name for name in options if name.startswith(word)]

    value = re.fullmatch(r"(([^=]+)=\[?(?:.*,)?)(.*)", word)
    if value is None:
        names = hydra_query(plugin, config_name, " ".join([*words, word]))
        return [end for name in names if is_offered(name, word) for end in with_endings(name)]
    begun, key, rest = value.groups()
    overrides = [other for other in words if not other.startswith("-")]
    choices, _ = plugin._query_config_groups(f"{key}=", config_name, overrides)
    if choices:
        known = [choice.removeprefix(f"{key}=") for choice in choices]
    else:
        cfg = plugin.config_loader.load_configuration(config_name, overrides, run_mode=RunMode.MULTIRUN)
        known = value_completions(cfg, key.lstrip("+"))
    found = [name for name in known if name.startswith(rest)]
    return [begun + name for name in (found if found or choices else path_completions(rest))]


def is_offered(name: str, word: str) -> bool:
    """Whether a key or group is for a person who has typed so much of it."""
    last = name.rstrip(".=").rpartition(".")[2]
    return not (last.startswith("_") and not word.rpartition(".")[2].startswith("_")) and (
        word != "" or not name.startswith(HIDDEN_PREFIXES)
    )


def with_endings(name: str) -> list[str]:
    """A group that has choices and groups below it goes on in two ways, of which Hydra says neither."""
    return [name] if name.endswith((".", "=", "/")) else [f"{name}=", f"{name}/"]


def value_completions(cfg: DictConfig, key: str) -> list[str]:
    """The words that an argument takes, by its signature; of another, what it is now, unless that is a path."""
    place, _, name = key.rpartition(".")
    node, now = OmegaConf.select(cfg, place) if place else cfg, OmegaConf.select(cfg, key)
    words: list[str] = []
    if isinstance(node, DictConfig) and "_target_" in node:
        schema = schema_of_type(read_signature(node["_target_"]).parameters.get(name))
        kinds = {"boolean": [True, False], "null": [None]}
        for part in schema.get("anyOf", [schema]):
            words += map(show, part.get("enum", kinds.get(part.get("type"), [])))
        words = [] if words == ["null"] else words  # that it may be left out says nothing of what it is
    if not words and isinstance(now, bool):
        words = ["true", "false"]
    return words or ([] if now is None or isinstance(now, Container) or name.endswith(PATH_SUFFIXES) else [show(now)])


def path_completions(begun: str) -> list[str]:
    """Files and folders whose path begins so; a folder's ends with a slash, to go on from."""
    shown, slash, name = begun.rpartition("/")
    place = Path(shown + slash or ".").expanduser()
    entries = [entry for entry in place.iterdir() if entry.name.startswith(name)] if place.is_dir() else []
    return [
        f"{shown}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if not entry.name.startswith(".") or name.startswith(".")
    ]
