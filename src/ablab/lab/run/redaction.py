"""Hide secrets in copies of a run's facts: uploads, logs, the page of runs, reports, recorded commands.

A run is rebuilt from config.yaml, the overrides in run.json and changes.patch. There, a secret is hidden only in the
settings of loggers, which cannot change a result (`redact_loggers`, `redact_overrides`); all else stays as it was.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

from ablab.errors import first_line as first_line_of
from ablab.lab.config.schema import quoted
from ablab.lab.run.identity import flat

HIDDEN = "***"

# Names of environment variables and of settings.
SECRET_VARIABLE = re.compile(
    r"KEY(?!BOARD)|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?:^|_)(?:PASS|AUTH|DSN)(?:_|$)|_PWD(?:_|$)",
    re.IGNORECASE,
)
SECRET_SETTING = re.compile(
    r"(?:api|access|auth|private|secret)[_-]?key$|(?:^|[_-])token$|passw|secret|credential", re.IGNORECASE
)
SPECIAL_TOKEN = re.compile(r"(?:^|_)(?:bos|cls|eos|mask|pad|sep|unk)_token$")  # of a tokenizer, and no secret
SHORTEST_SECRET = 6  # shorter values of variables are words like any other

# A value is hidden where it is a whole word: between spaces, quotes, brackets or what ends a phrase. Within a path or
# a longer word it stays, since it is there by accident (PGPASSWORD=postgres, /home/postgres/data).
BEFORE = r"(?<![^\s\"'`=,;:(\[{<>&|])"
AFTER = r"(?![^\s\"'`,;:)\]}<>&|\\!?.]|[.!?][^\s\"')\]}])"
IN_AN_ADDRESS = re.compile(r"(://)[^/\s\"']+@")  # a name and a password, or a token alone
IN_A_QUERY = re.compile(
    r"(?i)([?&][^\s\"'=&#]*(?:key|token|secret|passw|pwd|auth(?!or)|credential|signature|\bsig)[^\s\"'=&#]*=)[^\s\"'&#]+"
)
IN_A_TEXT = re.compile(
    r"(?i)([\w.]*(?:api_?key|secret|password|(?:access|auth|bearer|hf)_token)[\"']?\s*[=:]\s*[\"']?)([^\s'\",}]{6,})"
)
OVERRIDE = re.compile(r"([+~-]*[\w./@-]+)=(.+)", re.DOTALL)


def redact(value: Any, key: str = "") -> Any:
    """Return a copy of plain data in which secrets are `***`.

    A secret is the value of a setting that is named like one (`api_key`, `password`, `token`), the value of an
    environment variable that is named like one, where it is a whole value or word, and a password or token in an
    address.

    Args:
        value: a text, or nested mappings and lists of plain values.
        key: the name of the setting that has the value.
    """
    return hide(value, key, variables())


def first_line(error: BaseException) -> str:
    """Return the first line of an error without secrets: libraries write addresses and keys into their messages."""
    line: str = redact(first_line_of(error))
    return line


def redact_addresses(text: str) -> str:
    """Return a text without passwords and tokens in its addresses."""
    return IN_AN_ADDRESS.sub(rf"\1{HIDDEN}@", IN_A_QUERY.sub(rf"\1{HIDDEN}", text))


def redact_loggers(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a resolved config without secrets in its loggers, and the full keys of the values that are hidden."""
    loggers = config.get("logger") or {}
    clean = redact(loggers)
    before, after = flat(loggers), flat(clean)
    hidden = [f"logger.{key}" for key in before if before[key] != after[key]]
    return ({**config, "logger": clean} if hidden else dict(config)), hidden


def redact_overrides(words: Sequence[str]) -> list[str]:
    """Return overrides of the command line without secrets in those of loggers; they can still be parsed."""
    return [redact_override(word) if re.match(r"[+~]*logger[./=]", word) else word for word in words]


def redact_override(word: str) -> str:
    name, _, _ = word.partition("=")
    try:
        [override] = OverridesParser.create().parse_overrides([word])
        value = plain(override.value())
    except HydraException:
        return f"{name}={HIDDEN}"
    clean = redact(value, name.rpartition(".")[2])
    if clean == value:
        return word
    return f"{name}={quoted(clean) if isinstance(clean, str | list) else HIDDEN}"


def plain(value: Any) -> Any:
    """Return a value of Hydra's parser as plain data."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, Mapping):
        return {str(plain(name)): plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def hide(value: Any, key: str, secrets: re.Pattern[str] | None) -> Any:
    if isinstance(value, Mapping):
        return {name: hide(item, str(name), secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, key, secrets) for item in value]
    if isinstance(value, bool) or value in (None, "") or not isinstance(value, str | int | float):
        return value
    if is_secret(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    if (override := OVERRIDE.fullmatch(value)) and is_secret(override[1]):
        return f"{override[1]}={HIDDEN}"
    text = secrets.sub(HIDDEN, value) if secrets is not None else value
    return redact_addresses(IN_A_TEXT.sub(rf"\1{HIDDEN}", text))


@cache
def is_secret(key: str) -> bool:
    """Return whether a setting is named like a secret; asked for every value of a record."""
    name = re.sub(r"(\.\d+)+$", "", key).rpartition(".")[2]  # an item of a list has a number behind its name
    return SECRET_SETTING.search(name) is not None and SPECIAL_TOKEN.search(name) is None


@cache
def is_secret_variable(name: str) -> bool:
    return SECRET_VARIABLE.search(name) is not None


def variables() -> re.Pattern[str] | None:
    """Return a pattern for the values of environment variables that are named like secrets; None without any."""
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_variable(name)
        and len(value) >= SHORTEST_SECRET
        and not (os.path.isabs(value) and os.path.exists(value))  # where a secret is, not the secret
    }
    # on Hydra's command line quotes are escaped
    values |= {value.replace(quote, f"\\{quote}") for value in values for quote in "'\""}
    return pattern(tuple(sorted(values, key=lambda value: (-len(value), value)))) if values else None


@lru_cache(maxsize=8)
def pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{BEFORE}(?:{'|'.join(map(re.escape, values))}){AFTER}")
