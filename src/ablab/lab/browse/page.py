"""The page: one file with its style, its program and its data inside, which asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ablab.errors import ConfigError

NAME = "index.html"


def page(content: dict[str, Any]) -> str:
    """The page of what `collect` found.

    Two walls keep text of a run from becoming a part of the page: the data hold no "<", and the policy lets no
    program run but the page's own, and nothing be loaded.
    """
    style, script = part("page.css"), part("page.js")
    policy = f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'; base-uri 'none'"
    texts = {
        "policy": escape(policy, quote=False),
        "title": escape(content["folder"].encode("utf-8", "replace").decode()),
        "style": style,
        "data": json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: texts[found[1]], part("page.html"))


def part(name: str) -> str:
    return (resources.files("ablab.lab.browse") / name).read_text(encoding="utf-8")


def digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write the page into a folder of runs, whole or not at all.

    Raises:
        ConfigError: nothing can be written there.
    """
    file = folder / NAME
    temporary = folder / f".{NAME}.{os.getpid()}"
    try:
        temporary.write_text(page(content), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{file}: it cannot be written ({error.strerror}); make room, or copy the runs") from error
    return file
