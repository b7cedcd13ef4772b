"""One message instead of a traceback, for everything that a user or a config can get wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

BAD_INPUT = 2  # the exit code; 1 is a crash


class ConfigError(ValueError):
    """A value, its place in the config and the remedy; raised before any training starts."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print bad input as one message and leave with exit code 2; HYDRA_FULL_ERROR=1 asks for the traceback."""
    wanted = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its errors on instead of printing them itself
    try:
        yield
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        bare = not isinstance(error, ConfigError | HydraException | OmegaConfBaseException)
        if wanted or (bare and not str(error).startswith("Config group override")):  # Hydra's answer to model=null
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = "1" if wanted else "0"


def describe(error: Exception) -> str:
    """What to tell the user."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={choice}: there is no such choice; {menu(choice, error.options, group)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: not of the form key=value ({error.message.splitlines()[0]}); quote what the shell takes"
        )
    cause = error.__cause__
    node = getattr(cause, "parent_node", None)
    if isinstance(cause, OmegaConfBaseException) and cause.key is not None and node is not None:
        place = cause.full_key or cause.key
        parent = place.rpartition(".")[0]
        keys = [str(key) for key in node if not str(key).startswith("_")]
        if str(cause.key) not in keys:
            return f"{place}: there is no such key; {menu(str(cause.key), keys, parent or 'the top level')}"
    return str(error).strip()


def menu(word: str, choices: Sequence[str], place: str) -> str:
    """What there is instead of `word`, the likeliest first."""
    close = get_close_matches(word, choices, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{meant}{place} has: {', '.join(sorted(choices))}"
