"""Shell completion: Hydra's, extended.

Hydra completes groups, choices and keys. This module completes paths (resume=runs/), values of an argument
(model.cell=), further choices of a sweep (norm=batchnorm,gr) and options with dashes.
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
HIDDEN_PREFIXES = ("hydra", "cell")  # offered only after something has been typed
PATH_SUFFIXES = ("dir", "file", "folder", "path", "root")  # endings of keys that hold a path

hydra_query: Query = CompletionPlugin._query


def register() -> None:
    """Install this completion in Hydra's plugins for all shells."""
    CompletionPlugin._query = query  # type: ignore[method-assign, assignment]


def query(plugin: CompletionPlugin, config_name: str | None, line: str) -> list[str]:
    """Return the completions of the last word of a command line; empty if the words before it are invalid.

    Args:
        plugin: the plugin of the shell.
        config_name: the name of the root config.
        line: the text typed after `train.py`.
    """
    *words, word = [*line.split(), *([""] if line.endswith(" ") or not line else [])]
    # no messages while the user is typing
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        try:
            return sorted(completions(plugin, config_name, shlex.split(" ".join(words)), word))
        except (Exception, SystemExit):  # from Hydra's parser, a failed import or an unreadable folder
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
    """Return whether to offer a key or group, given the text typed so far."""
    last = name.rstrip(".=").rpartition(".")[2]
    return not (last.startswith("_") and not word.rpartition(".")[2].startswith("_")) and (
        word != "" or not name.startswith(HIDDEN_PREFIXES)
    )


def with_endings(name: str) -> list[str]:
    """Return the continuations of a name: Hydra adds neither = nor / to a group with choices and nested groups."""
    return [name] if name.endswith((".", "=", "/")) else [f"{name}=", f"{name}/"]


def value_completions(cfg: DictConfig, key: str) -> list[str]:
    """Return the values that an argument accepts by its signature, or else the current value unless it is a path."""
    place, _, name = key.rpartition(".")
    node, now = OmegaConf.select(cfg, place) if place else cfg, OmegaConf.select(cfg, key)
    words: list[str] = []
    if isinstance(node, DictConfig) and "_target_" in node:
        schema = schema_of_type(read_signature(node["_target_"]).parameters.get(name))
        kinds = {"boolean": [True, False], "null": [None]}
        for part in schema.get("anyOf", [schema]):
            words += map(show, part.get("enum", kinds.get(part.get("type"), [])))
        words = [] if words == ["null"] else words  # null alone gives no type
    if not words and isinstance(now, bool):
        words = ["true", "false"]
    return words or ([] if now is None or isinstance(now, Container) or name.endswith(PATH_SUFFIXES) else [show(now)])


def path_completions(begun: str) -> list[str]:
    """Return the files and folders that begin with a path; folders end with a slash."""
    shown, slash, name = begun.rpartition("/")
    place = Path(shown + slash or ".").expanduser()
    entries = [entry for entry in place.iterdir() if entry.name.startswith(name)] if place.is_dir() else []
    return [
        f"{shown}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if not entry.name.startswith(".") or name.startswith(".")
    ]
