"""Record the origin of a result: the code, the environment and the machine."""

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

from ablab.lab.run.code import PACKAGE, changed_sources, code_of, sources_of
from ablab.lab.run.git import Checkout, read_checkout

ROOT = PACKAGE.parents[1]  # of the checkout
# The paths whose commit and changes are recorded.
CODE = ("train.py", "src", "conf", "pyproject.toml", "constraints.txt")


def environment() -> dict[str, Any]:
    """Return versions, devices and thread counts: all that must match for identical bits."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": driver_version(),
        "packages": installed_packages(),
    }


def environment_changes(then: Mapping[str, Any]) -> list[str]:
    """Describe the changes in the environment that affect the bits of a result, one line each."""
    now = environment()
    names = ("python", "processor", "threads", "accelerators", "cuda", "cudnn", "driver")
    lines = [f"{name}: {then[name]} then, {now[name]} now" for name in names if then[name] != now[name]]
    old, new = then["packages"], now["packages"]
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return lines + [f"{name}: {old.get(name, 'not there')} then, {new.get(name, 'not there')} now" for name in changed]


def changes_since(record: Mapping[str, Any], then: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Describe the changes in code and environment since a run, one line each.

    Args:
        record: the run's run.json.
        then: its environment.json.
        config: its resolved config as plain data, which names the code.
    """
    code = code_of(config)
    changes, old, new = environment_changes(then), record["identity"]["code"], code.digest[:16]
    if old != new:
        commits = record["git_commit"], checkout()
        parts = changed_sources(sources_of(record), sources_of({"sources": code.sources}))
        changed = f"; changed: {', '.join(parts)}" if "sources" in record else ""
        changes.insert(0, f"the code: {old} (commit {commits[0]}) then, {new} (commit {commits[1]}) now{changed}")
    return changes


@cache
def installed_packages() -> dict[str, str]:
    """Return every installed package and its version."""
    found = dict(filter(None, map(read_name_and_version, metadata.distributions())))
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def read_name_and_version(package: metadata.Distribution) -> tuple[str, str] | None:
    """Return the name and version of an installed package; None if its metadata has no name.

    Only two lines are parsed: `package.metadata` parses the whole file on each access, and a run's start waits for it.
    """
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or package.read_text("") or ""
    about = dict(re.findall(r"^(Name|Version): *(.*?)\s*$", text.partition("\n\n")[0], re.MULTILINE))
    return (about["Name"], about["Version"]) if about.get("Name") else None


@cache
def processor_name() -> str:
    """Return the name of the processor, as far as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None without one."""
    if not torch.cuda.is_available():
        return None
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        printed = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
        return printed.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def checkout() -> Checkout:
    """Return the commit of the code, and its files that differ from the commit."""
    return read_checkout(ROOT, CODE)


def command() -> list[str]:
    """Return the command that started this program."""
    return [sys.executable, *sys.argv]
