"""Where a result comes from: the code, the environment, the machine. No secrets."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ablab.runs.code import PACKAGE, changed_sources, code_of, sources_of

ROOT = PACKAGE.parents[1]  # of a checkout; what is recorded of git is about these of its files
CODE = ("train.py", "src", "conf", "pyproject.toml", "constraints.txt")

SECRET_NAME = re.compile(
    r"KEY(?!BOARD)|TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(?:^|_)(?:PASS|AUTH|DSN)(?:_|$)|_PWD(?:_|$)",
    re.IGNORECASE,
)
SECRET_KEY = re.compile(  # of a config
    r"(?:api|access|auth|private|secret)_?key$|(?:^|_)token$|passw|secret|credential", re.IGNORECASE
)
SHORTEST_SECRET = 6  # shorter values would blot out words
IN_AN_ADDRESS = re.compile(r"(://)[^/\s\"']+@")  # a name and a password, or a token alone
IN_A_QUERY = re.compile(
    r"(?i)([?&][^\s\"'=&#]*(?:key|token|secret|passw|pwd|auth(?!or)|credential|signature|\bsig)[^\s\"'=&#]*=)[^\s\"'&#]+"
)
SECRET_ASSIGNMENT = re.compile(
    r"(?i)([\w.]*(?:api_?key|secret|password|(?:access|auth|bearer|hf)_token)\s*[=:]\s*)([^\s'\",}]{6,})"
)


def environment() -> dict[str, Any]:
    """Versions, devices and threads: what must be the same for the same bits."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": driver(),
        "packages": packages(),
    }


def environment_changes(then: Mapping[str, Any]) -> list[str]:
    """What of the environment that decides the bits is not what it was, a line each; where it is called is no part."""
    now = environment()
    names = ("python", "processor", "threads", "accelerators", "cuda", "cudnn", "driver")
    lines = [f"{name}: {then[name]} then, {now[name]} now" for name in names if then[name] != now[name]]
    old, new = then["packages"], now["packages"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return lines + [f"{name}: {old.get(name, 'not there')} then, {new.get(name, 'not there')} now" for name in changed]


def changes_since(record: Mapping[str, Any], then: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """List the changes of code and environment since a run was made, a line each.

    Args:
        record: the run's run.json.
        then: its environment.json.
        config: its resolved config as plain data, which names the code.
    """
    code = code_of(config)
    changes, old, new = environment_changes(then), record["identity"]["code"], code.digest[:16]
    if old != new:
        commits = record["git_commit"], git_commit()
        parts = changed_sources(sources_of(record), sources_of({"sources": code.sources}))
        changed = f"; changed: {', '.join(parts)}" if "sources" in record else ""
        changes.insert(0, f"the code: {old} (commit {commits[0]}) then, {new} (commit {commits[1]}) now{changed}")
    return changes


@cache
def packages() -> dict[str, str]:
    """Every installed package and its version."""
    found = dict(filter(None, map(name_and_version, metadata.distributions())))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def name_and_version(package: metadata.Distribution) -> tuple[str, str] | None:
    """Of an installed package; None where it does not say its name.

    Only two lines are read: `package.metadata` reads all of it anew each time it is asked, and a run's start waits.
    """
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or package.read_text("") or ""
    about = dict(re.findall(r"^(Name|Version): *(.*?)\s*$", text.partition("\n\n")[0], re.MULTILINE))
    return (about["Name"], about["Version"]) if about.get("Name") else None


@cache
def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    if not torch.cuda.is_available():
        return None
    try:
        return said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def git_commit() -> str | None:
    """The commit of the code, with "+changes" where the working tree differs; None outside a repository."""
    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def uncommitted() -> str:
    """What the code has that the commit has not, new files included, as a patch that `git apply` takes."""
    try:
        patch = git("diff", "HEAD", "--binary", "--", *CODE, strip=False)
        for name in git("ls-files", "--others", "--exclude-standard", "--", *CODE).splitlines():
            patch += git("diff", "--no-index", "--binary", "--", os.devnull, name, strip=False, differs=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return patch


def git(*arguments: str, strip: bool = True, differs: bool = False) -> str:
    return said("git", "-C", str(ROOT), *arguments, strip=strip, may=(0, 1) if differs else (0,))


def said(*command: str, strip: bool = True, may: tuple[int, ...] = (0,)) -> str:
    """What a command prints.

    Raises:
        CalledProcessError: its exit code is none that it may have.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode not in may:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout.strip() if strip else done.stdout


def redacted(text: str) -> str:
    """The text without the values of environment variables that are named like secrets, and what is assigned to one."""
    for name, value in os.environ.items():
        if like_a_secret(name) and len(value) >= SHORTEST_SECRET and not os.path.exists(value):
            text = text.replace(value, "***")
    text = IN_A_QUERY.sub(r"\1***", SECRET_ASSIGNMENT.sub(r"\1***", text))
    return IN_AN_ADDRESS.sub(r"\1***@", text)


def first_line(error: BaseException) -> str:
    """What is said of an error where a line is enough; libraries write addresses and keys into theirs."""
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])


@cache
def like_a_secret(name: str) -> bool:
    """Whether an environment variable is named like a secret; asked for every text of a record."""
    return SECRET_NAME.search(name) is not None


def without_secrets(value: Any, key: str = "") -> Any:
    """Plain data whose texts are free of secrets; names of classes stay, so that a config can be built again."""
    if isinstance(value, str):
        if value and SECRET_KEY.search(key):
            return "***"
        name, equals, _ = value.partition("=")  # a word of a command
        if equals and SECRET_KEY.search(name.rpartition(".")[2]):
            return f"{name}=***"
        return value if key == "_target_" else redacted(value)
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return value


def command() -> list[str]:
    """The command that started this program."""
    return [sys.executable, *sys.argv]
