"""Readable one-line errors instead of tracebacks, for every mistake in a command line or config."""

from __future__ import annotations

import glob
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from ablab.errors import BAD_INPUT, ConfigError, RunError, first_line
from ablab.lab.config.yaml_files import CONF, check_yaml, display_path
from ablab.rank import is_local_rank_zero, remove_stale_rank_variables
from ablab.screen import print_utf8, tolerate_broken_streams, wrap_to_terminal

GRACE_SECONDS = 5.0  # for the first process of a run to report the error

# Patterns of Hydra's error messages, and the message to show instead.
HYDRA_MESSAGES = {
    r"Ambiguous value for argument '(.+)'": r"\1: several values are a sweep; add -m to run each, or give one",
    r"Could not override 'callbacks/(.+)'\.(?:\n|.)*use \+(.+)": r"\2: it adds to the callbacks; put a plus before it, "
    "'+\\2'",
    r"Could not override '.*/(.+)'\.(?:\n|.)*use \+(.+)": r"\2: nothing that is chosen has a \1; leave it out",
    r"Could not override '(.*)'\.(?:\n|.)*use \+(.+)": r"\2: there is no group \1 to choose from",
    r"In '(.+)/(.+)': Could not override 'task'\.(?:.|\n)*": r"\1=\2: it overrides the task; data name theirs in "
    "defaults by override /task_of_data@_global_.task_of_data: NAME",
    r"In '(.+)/(.+)': Could not override '(.+)'\. No match.*": r"\1=\2: it sets \3, which nothing that is chosen has; "
    "leave it out",
    r"Multiple values for .*'override (.+): (.+)'": r"+\1=\2: one is chosen already; leave the + out, \1=\2",
    r"force-add of config groups is not supported: '\+\+(callbacks/.+)'": r"++\1: one plus adds it, '+\1'",
    r"force-add of config groups is not supported: '\+\+(.+)'": r"++\1: a choice needs no ++; leave it out, \1",
    r"Could not append to config\. .*\n.*prefix: '(.+)'": r"+\1: there is one already; leave the + out, \1",
    r"Could not delete '(.+)'\. No match.*": r"~\1: it is not what is chosen; leave it out",
    r"Could not delete from config\. '(.+)' does not.*": r"~\1: it is not set; leave it out",
    r"In '(.+)': Could not load '(.+)'\.(?:.|\n)*": r"\1: it builds upon \2, which is not there; choose another",
    r"(.+) appears more than once in the final.*": r"\1: a group has been given two choices; give one",
}


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print invalid input as one message and exit with code 2; HYDRA_FULL_ERROR=1 shows the traceback.

    A `RunError` is printed too, and exits with its own code. Nested contexts act like one.

    Every program enters this context first: it makes the standard streams and the environment safe before heavy
    imports.
    """
    tolerate_broken_streams()
    print_utf8()
    remove_stale_rank_variables()
    try:
        os.getcwd()
    except OSError as error:
        print_error(f"the folder in which this program was started is gone ({error.strerror}); cd to one that is there")
        sys.exit(BAD_INPUT)
    shows_traceback = is_local_rank_zero() and is_traceback_wanted()
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        yield
    except (ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError, OSError) as error:
        known = isinstance(error, ConfigError | HydraException | OmegaConfBaseException)
        message = yaml_file_message(error) or (readable_message(error) if known or is_raised_by_hydra(error) else None)
        if shows_traceback or message is None:
            raise
        print_error(message)
        sys.exit(BAD_INPUT)
    except SystemExit as stop:
        if (ours := hydra_exit_message(stop)) is None:
            raise
        print_error(ours)
        sys.exit(BAD_INPUT)
    except RunError as error:
        if shows_traceback:
            raise
        print_error(str(error))
        sys.exit(error.exit_code)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before


def print_error(message: str) -> None:
    """Print an error once for all processes of a run on this machine, in the first one."""
    if is_local_rank_zero():
        print(wrap_to_terminal(f"error: {message}", sys.stderr), file=sys.stderr)
    else:
        time.sleep(GRACE_SECONDS)  # torchrun ends the first process as soon as another one exits


@cache
def is_traceback_wanted() -> bool:
    """Return whether the user set HYDRA_FULL_ERROR=1; cached, since the variable is then set for Hydra."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def raising_frame(error: BaseException) -> FrameType:
    """Return the frame in which an error was raised."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame


def module_name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def is_raised_by_hydra(error: Exception) -> bool:
    """Return whether Hydra itself raised an error; for some overrides it raises a bare ValueError."""
    return module_name(raising_frame(error)).startswith("hydra.")


def yaml_file_message(error: Exception) -> str | None:
    """Return the message for a YAML file that Hydra could not read, with its line; None for other errors."""
    if isinstance(error, ConfigError) or (file := find_yaml_being_read(error)) is None:
        return None
    try:
        check_yaml(file)
    except ConfigError as problem:
        return str(problem)
    if isinstance(error, RecursionError) and (circle := find_defaults_cycle(file)):
        names = " -> ".join(map(display_path, circle))
        return f"{display_path(file)}: its defaults go in a circle, {names}; leave one of them out"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return None  # Hydra's own message says more
    return f"{display_path(file)}: it cannot be read ({first_line(error)})"


def find_yaml_being_read(error: BaseException) -> Path | None:
    """Return the YAML file that was being read when an error was raised; None if there is none.

    Only stack frames of Hydra, OmegaConf and PyYAML count, from the innermost one outwards.
    """
    if found := re.match(r"In '([^']+)': \w+ raised while composing config", str(error)):
        file = CONF / f"{found[1]}.yaml"
        return file if file.is_file() else None
    reads = module_name(raising_frame(error)).partition(".")[0] in ("yaml", "omegaconf", "codecs")
    if not (reads or isinstance(error, RecursionError) or "defaults" in str(error)):
        return None  # errors about an override are described in `readable_message`
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        top = module_name(frame).partition(".")[0]
        if top not in ("yaml", "omegaconf", "hydra", "codecs", "posixpath", "os", "re", "typing", "abc", "importlib"):
            return None
        for value in list(frame.f_locals.values()):
            name = getattr(value, "name", None) if isinstance(value, io.IOBase) else value
            for candidate in (name, f"{CONF}/{name}.yaml") if isinstance(name, str) and "\0" not in name else ():
                if candidate.endswith(".yaml") and len(candidate) < 4096 and os.path.isfile(candidate):
                    return Path(candidate)
    return None


def find_defaults_cycle(file: Path, before: tuple[Path, ...] = ()) -> list[Path]:
    """Return the files of a cycle in the defaults lists; empty if there is none."""
    if file in before:
        return [*before[before.index(file) :], file]
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", [])
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return []
    for entry in entries:
        for group, choice in entry.items() if isinstance(entry, dict) else [("", entry)]:
            group = str(group).rpartition(" ")[2].partition("@")[0]
            name = "/".join(filter(None, (group, str(choice).partition("@")[0])))
            folder = CONF if name.startswith("/") else file.parent
            following = folder / f"{name.lstrip('/')}.yaml"
            if following.is_file() and (found := find_defaults_cycle(following, (*before, file))):
                return found
    return []


def hydra_exit_message(stop: SystemExit) -> str | None:
    """Return the message for an exit of Hydra or its parser; None for other exits, and for clear ones.

    This reads local variables of Hydra. If their names change, the messages of Hydra itself remain.
    """
    frame = raising_frame(stop)
    known = frame.f_locals
    if module_name(frame) == "argparse" and "unrecognized arguments" in str(known.get("message")):
        return "what is set takes no dashes: norm=groupnorm data.batch_size=8"
    place, cfg = known.get("package"), known.get("cfg")
    if module_name(frame).startswith("hydra.") and isinstance(place, str) and isinstance(cfg, DictConfig):  # --package
        return f"--package {place}: there is no such part; {menu(place, [str(key) for key in cfg], 'the config')}"
    return None


def readable_message(error: Exception) -> str:
    """Return the message to show for an error."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return unknown_choice_message(group, choice, error.options)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override}: not of the form key=value; leave no space around the ="
        if error.override.endswith(","):
            return f"{error.override}: its list ends with a comma; leave no space behind one, key=1,2"
        return (
            f"{error.override}: not of the form key=value ({error.message.splitlines()[0]}); "
            "quote what has signs in it, 'key=\"value\"'"
        )
    if isinstance(error, InterpolationResolutionError):
        reason = str(error.msg).splitlines()[0].rpartition("resolving interpolation: ")[2]
        return f"{error.full_key}: what its ${{…}} stands for is not there ({reason}); give the value itself"
    word = getattr(raising_frame(error).f_locals.get("override"), "input_line", None)
    # Hydra's message for model=null does not name the group
    if word and str(error).startswith("Config group override"):
        return f"{word}: a group takes the name of a choice; python train.py --help shows them"
    cause = error.__cause__
    node = getattr(cause, "parent_node", None)
    if isinstance(cause, GrammarParseError):
        place = cause.full_key or cause.key
        return f"{place}: its ${{…}} cannot be read ({first_line(cause)}); a text that has ${{ in it is written \\${{"
    if isinstance(cause, OmegaConfBaseException) and cause.key is not None and node is not None:
        if (problem := unknown_key_message(cause, node)) is not None:
            return problem
        return (
            f"{cause.full_key or cause.key}: {str(cause.msg).splitlines()[0]}; give a value of the kind that is there"
        )
    if (found := re.match(r"In 'train': Could not load '(.+)/(.+)'\.", str(error))) and (CONF / found[1]).is_dir():
        options = [file.stem for file in (CONF / found[1]).glob("*.yaml")]
        return unknown_choice_message(found[1], found[2], options)  # one of several, [drift,other]
    for theirs, ours in HYDRA_MESSAGES.items():
        if found := re.match(theirs, str(error)):
            return found.expand(ours).replace("['", "[").replace("']", "]").replace("', '", ",")  # as typed
    return str(error).strip()


def unknown_choice_message(group: str, choice: str, options: Sequence[str]) -> str:
    """Return the message for a choice that a group does not have, with the likely one."""
    below = f"did you mean {word}? " if (word := find_nested_choice(group, choice)) else ""
    return f"{group}={choice}: there is no such choice; {below}{menu(choice, options, group)}"


def find_nested_choice(group: str, choice: str) -> str | None:
    """Return the override that selects a choice in a nested group, +callbacks/measure=drift; None if there is none."""
    files = sorted(CONF.glob(f"{glob.escape(group)}/[!_]*/{glob.escape(choice)}.yaml"))
    return f"{'+' * (group == 'callbacks')}{files[0].parent.relative_to(CONF).as_posix()}={choice}" if files else None


def find_group(name: str, parent: str = "*") -> str | None:
    """Return the override prefix of a nested group, +callbacks/measure; None if there is none."""
    folders = sorted(CONF.glob(f"{parent if parent == '*' else glob.escape(parent)}/{glob.escape(name)}/"))
    word = folders[0].relative_to(CONF).as_posix() if folders and not name.startswith("_") else None
    return f"+{word}" if word and word.startswith("callbacks/") else word


def unknown_key_message(error: OmegaConfBaseException, node: Any) -> str | None:
    """Return the message for a key that its node does not have; None if the node has it."""
    key, place = str(error.key), error.full_key or str(error.key)
    parent = place.rpartition(".")[0]
    keys = [str(name) for name in node if not str(name).startswith("_")]
    if key in keys:
        return None
    if parent:
        word = find_group(key) if find_group(key, parent) else find_nested_choice(parent, key)
        meant = f"did you mean {word}? " if word else ""
        return f"{place}: there is no such key; {meant}{menu(key, keys, parent)}"
    homes = [f"{name}.{key}" for name in keys if isinstance(node._get_node(name), DictConfig) and key in node[name]]
    homes = homes or [word for word in [find_group(key)] if word]
    meant = f"did you mean {' or '.join(homes)}? " if homes else ""
    keys = sorted({*keys, *config_groups()} - {"hydra"})
    return f"{place}: there is no such key; {meant}{menu(key, keys, 'the top level')}"


def config_groups() -> list[str]:
    """Return the folders of conf that hold choices, including nested ones such as norm/weight."""
    folders = {file.parent.relative_to(CONF).as_posix() for file in CONF.rglob("*.yaml")}
    return sorted(folder for folder in folders if folder != "." and not folder.rpartition("/")[2].startswith("_"))


def menu(word: str, choices: Sequence[str], place: str) -> str:
    """Return a message with the valid choices, the likely one first."""
    if not choices:
        return f"{place} has none"
    close = get_close_matches(word, choices, n=1) or get_close_matches(word.lower(), choices, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}{place} has: {', '.join(sorted(choices))}"
