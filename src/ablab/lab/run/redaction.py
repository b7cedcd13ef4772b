"""Hide secrets in copies of a run's facts: uploads, logs, the page of runs, reports, recorded commands.

A run is rebuilt from config.yaml, the overrides in run.json and changes.patch. There, a secret is hidden only in the
settings of loggers, which cannot change a result (`redact_loggers`, `redact_overrides`); all else is unchanged.
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
from ablab.lab.config.schema import quote_value
from ablab.lab.run.identity import flat

HIDDEN = "***"

# Patterns for names of environment variables and of settings.
SECRET_VARIABLE = re.compile(
    r"KEY(?!BOARD)|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?:^|_)(?:PASS|AUTH|DSN)(?:_|$)|_PWD(?:_|$)",
    re.IGNORECASE,
)
SECRET_SETTING = re.compile(
    r"(?:api|access|auth|private|secret)[_-]?key$|(?:^|[_-])token$|passw|secret|credential", re.IGNORECASE
)
# special tokens of a tokenizer are not secrets
SPECIAL_TOKEN = re.compile(r"(?:^|_)(?:bos|cls|eos|mask|pad|sep|unk)_token$")
SHORTEST_SECRET = 6  # shorter values of variables could be any word

# A value is only hidden as a whole word: between spaces, quotes, brackets or punctuation. Inside a path or a longer
# word it is a coincidence and stays (PGPASSWORD=postgres, /home/postgres/data).
WORD_START = r"(?<![^\s\"'`=,;:(\[{<>&|])"
WORD_END = r"(?![^\s\"'`,;:)\]}<>&|\\!?.]|[.!?][^\s\"')\]}])"
ADDRESS_CREDENTIALS = re.compile(r"(://)[^/\s\"']+@")  # user and password, or a token alone
QUERY_SECRET = re.compile(
    r"(?i)([?&][^\s\"'=&#]*(?:key|token|secret|passw|pwd|auth(?!or)|credential|signature|\bsig)[^\s\"'=&#]*=)[^\s\"'&#]+"
)
TEXT_SECRET = re.compile(
    r"(?i)([\w.]*(?:api_?key|secret|password|(?:access|auth|bearer|hf)_token)[\"']?\s*[=:]\s*[\"']?)([^\s'\",}]{6,})"
)
OVERRIDE = re.compile(r"([+~-]*[\w./@-]+)=(.+)", re.DOTALL)


def redact(value: Any, key: str = "") -> Any:
    """Return a copy of plain data with secrets replaced by `***`.

    Secrets are the values of settings with names like `api_key`, `password` or `token`; the values of environment
    variables with such names, as a whole value or word; and passwords or tokens in URLs.

    Args:
        value: a string, or nested mappings and lists of plain values.
        key: the name of the setting that has the value.
    """
    return redact_value(value, key, secret_variables())


def first_line(error: BaseException) -> str:
    """Return the first line of an error without secrets: libraries put URLs and keys into their messages."""
    line: str = redact(first_line_of(error))
    return line


def redact_addresses(text: str) -> str:
    """Return a text without passwords and tokens in its URLs."""
    return ADDRESS_CREDENTIALS.sub(rf"\1{HIDDEN}@", QUERY_SECRET.sub(rf"\1{HIDDEN}", text))


def redact_loggers(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a resolved config without the secrets of its loggers, and the full keys of the hidden values."""
    loggers = config.get("logger") or {}
    clean = redact(loggers)
    before, after = flat(loggers), flat(clean)
    hidden = [f"logger.{key}" for key in before if before[key] != after[key]]
    return ({**config, "logger": clean} if hidden else dict(config)), hidden


def redact_overrides(overrides: Sequence[str]) -> list[str]:
    """Return overrides without the secrets of loggers; they can still be parsed."""
    return [redact_override(word) if re.match(r"[+~]*logger[./=]", word) else word for word in overrides]


def redact_override(word: str) -> str:
    name, _, _ = word.partition("=")
    try:
        [override] = OverridesParser.create().parse_overrides([word])
        value = to_plain(override.value())
    except HydraException:
        return f"{name}={HIDDEN}"
    clean = redact(value, name.rpartition(".")[2])
    if clean == value:
        return word
    return f"{name}={quote_value(clean) if isinstance(clean, str | list) else HIDDEN}"


def to_plain(value: Any) -> Any:
    """Return a value of Hydra's override parser as plain data."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, Mapping):
        return {str(to_plain(name)): to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list) else value


def redact_value(value: Any, key: str, secrets: re.Pattern[str] | None) -> Any:
    if isinstance(value, Mapping):
        return {name: redact_value(item, str(name), secrets) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(item, key, secrets) for item in value]
    if isinstance(value, bool) or value in (None, "") or not isinstance(value, str | int | float):
        return value
    if is_secret(key):
        return HIDDEN
    if not isinstance(value, str):
        return value
    if (override := OVERRIDE.fullmatch(value)) and is_secret(override[1]):
        return f"{override[1]}={HIDDEN}"
    text = secrets.sub(HIDDEN, value) if secrets is not None else value
    return redact_addresses(TEXT_SECRET.sub(rf"\1{HIDDEN}", text))


@cache
def is_secret(key: str) -> bool:
    """Return whether a setting has a name like a secret; called for every value of a record."""
    name = re.sub(r"(\.\d+)+$", "", key).rpartition(".")[2]  # list items have a number after their name
    return SECRET_SETTING.search(name) is not None and SPECIAL_TOKEN.search(name) is None


@cache
def is_secret_variable(name: str) -> bool:
    return SECRET_VARIABLE.search(name) is not None


def secret_variables() -> re.Pattern[str] | None:
    """Return a pattern for the values of environment variables with secret-like names; None without any."""
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_variable(name)
        and len(value) >= SHORTEST_SECRET
        and not (os.path.isabs(value) and os.path.exists(value))  # the path of a secret, not the secret
    }
    # on Hydra's command line quotes are escaped
    values |= {value.replace(quote, f"\\{quote}") for value in values for quote in "'\""}
    return compile_pattern(tuple(sorted(values, key=lambda value: (-len(value), value)))) if values else None


@lru_cache(maxsize=8)
def compile_pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"{WORD_START}(?:{'|'.join(map(re.escape, values))}){WORD_END}")
