"""Collect the content of a folder of runs as plain data for the page, without heavy imports, writes or locks."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from ablab.errors import ConfigError
from ablab.lab.browse.curves import FILE, fit_to_page, read_curves
from ablab.lab.run.folder import (
    ABLATION,
    CONFIG,
    LOG,
    TIME_FORMAT,
    check_keys,
    failure_reason,
    read_record,
    relpath,
    resume_command,
    timestamp,
)
from ablab.lab.run.identity import flat, without_effect
from ablab.lab.run.redaction import redact

RUN_FILES = ("run.json", "config.yaml", FILE, LOG, ".lock")  # a folder with one of these is a run, intact or damaged
FILES = ("run.json", "config.yaml", "environment.json", FILE, LOG, "samples.txt", "changes.patch", "profile")
STATES = ("running", "finished", "stopped", "diverged", "failed")
DAMAGED = "damaged"
HIDDEN_KEYS = ("ablation", "ablation.*", "cell", "cell.*")  # config keys shown elsewhere on the page
UNESCAPED = re.compile(r"\\([^\w\s]|_)")  # an escaped Markdown character
MAX_VALUES = 100_000  # in a config
MAX_INTEGER = 10**300  # the largest integer that JavaScript can read as a number
CLOCK_TOLERANCE = 60  # seconds, since adjusting the clock changes the apparent start time of a process
Reader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


def collect(root: Path) -> dict[str, Any]:
    """Return everything that the page shows.

    Args:
        root: a folder of runs, of ablations, or of folders of runs; or the folder of one ablation.

    Raises:
        ConfigError: the folder does not exist, or holds no run.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: there is no such folder; name the one that runs go to (output_dir), or make a run")
    if (root / "run.json").exists():
        raise ConfigError(f"{root}: it is one run; name the folder that it is in, {relpath(root.absolute().parent)}")
    runs, ablations = [], []
    for place, within in find_run_folders(root):
        runs.append(run_entry(place, root, within))
    for place in [root, *subfolders(root)]:
        if (place / ABLATION).exists():
            ablations.append(ablation_entry(place, root, runs))
    if not runs and not ablations:
        raise ConfigError(f"{root}: there is no run in it, nor in the folders in it; make one: python train.py")
    ids = Counter(entry["key"] for entry in runs)
    for entry in runs:
        if ids[entry["key"]] > 1 or not entry["key"]:  # copied folders share an id
            entry["key"] = entry["path"]
    return {
        "folder": relpath(root.absolute()),
        "written": timestamp(),
        "points": fit_to_page(runs),
        "runs": runs,
        "ablations": ablations,
        **common_config(runs),
    }


def find_run_folders(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield every folder of a run, begun or not, and the name of the ablation or folder that holds it."""
    inside = root.absolute().name if (root / ABLATION).exists() else None
    above = {root.resolve(), *root.resolve().parents}
    for child in subfolders(root):
        if is_run(child):
            yield child, inside
        elif child.resolve() not in above:  # skip a link back to a parent, whose runs are listed already
            yield from ((inner, child.name) for inner in subfolders(child) if is_run(inner))


def subfolders(folder: Path) -> list[Path]:
    """Return the readable subfolders."""
    try:
        return sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    except OSError:
        return []


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run; an unreadable folder counts as one, and is shown as damaged."""
    return any(os.path.lexists(folder / name) for name in RUN_FILES) or not os.access(folder, os.R_OK | os.X_OK)


# A run --------------------------------------------------------------------------------------------------------------


def run_entry(folder: Path, root: Path, within: str | None) -> dict[str, Any]:
    """Return the page's data for a run; a run with unreadable files is damaged, with the reasons in `problems`.

    Whatever is wrong with a run, the others stay on the page.
    """
    entry = blank_entry(folder, root, within)
    try:
        fill_entry(entry, folder)
        json.dumps(entry, allow_nan=False)  # fail here, for one run, rather than for the whole page
    except Exception as error:
        problems = [*entry["problems"], f"it cannot be shown ({type(error).__name__}: {' '.join(str(error).split())})"]
        entry = {**blank_entry(folder, root, within), "problems": problems}
    return entry


def blank_entry(folder: Path, root: Path, within: str | None) -> dict[str, Any]:
    """Return the page's data for a run without any readable file."""
    return {
        "key": "",
        "path": folder.relative_to(root).as_posix(),
        "link": quote(os.fsencode(folder.relative_to(root).as_posix())),
        "name": folder.name,
        "ablation": within,
        "state": DAMAGED,
        "error": "",
        "started": None,
        "ended": None,
        "seconds": None,
        "words": {},
        "choices": {},
        "metrics": {},
        "monitor": None,
        "curves": [],
        "epoch": None,
        "config": {},
        "record": {},
        "commands": [],
        "problems": [],
        "files": [name for name in FILES if os.path.exists(folder / name)],
    }


def fill_entry(entry: dict[str, Any], folder: Path) -> None:
    """Add the data from the files of a run."""
    problems = entry["problems"]
    read_part(problems, folder / "run.json", lambda: entry.update(read_record_facts(folder)))
    read_part(problems, folder / "config.yaml", lambda: entry.update(read_config_facts(folder, entry)))
    if os.path.lexists(folder / FILE):
        read_part(
            problems, folder / FILE, lambda: entry.update(zip(("curves", "epoch"), read_curves(folder), strict=True))
        )
    if problems:
        entry["state"] = DAMAGED
    problems[:] = [
        text.removeprefix(f"{folder}: ") for text in problems
    ]  # the page shows the folder beside the problem
    if entry["epoch"] is None:
        entry["epoch"] = steps_per_epoch(entry["record"])


def read_part(problems: list[str], file: Path, step: Callable[[], None]) -> None:
    """Run one reading step; an invalid file becomes one line on the page, and the rest is read."""
    try:
        if os.path.lexists(file) and not os.path.isfile(file):  # reading a named pipe would block
            raise ValueError("it is no regular file")
        step()
    except Exception as error:  # a file may hold anything
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = (
            reason if isinstance(error, OSError | ValueError | yaml.YAMLError) else f"{type(error).__name__}: {reason}"
        )
        problems.append(reason if f"its {file.name}" in reason else f"its {file.name} cannot be read ({reason})")


def read_record_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of run.json or, for a run that ended before it had one, of its log."""
    if not (folder / "run.json").exists() and (folder / LOG).exists() and (folder / LOG).stat().st_size:
        return {"state": "failed", "error": redact(failure_reason(folder)) or "its process ended without a message"}
    record = read_record(folder)
    error, metrics = str(record.get("error", "")), record.get("metrics") or {}
    if not isinstance(metrics, dict):
        raise ConfigError(f"{folder}: its run.json has metrics={str(metrics)[:40]}; a run writes names with numbers")
    state = record["status"]
    if state == "interrupted" or (state == "running" and not is_alive(record)):
        gone = f"its process {record.get('pid')} is gone, and has not said how it ended"
        state, error = "stopped", error or failure_reason(folder) or gone
    if state not in STATES:
        raise ConfigError(f"{folder}: its run.json has status={state!r}; a run writes one of {', '.join(STATES)}")
    place = relpath(folder)
    seconds = record.get("seconds")
    commands = [("reproduce", f"python scripts/reproduce.py {shlex.quote(place)}")]
    if state == "finished":
        commands.append(("evaluate", f"python scripts/evaluate.py {shlex.quote(place)}"))
    elif state in ("stopped", "failed"):
        commands.insert(0, ("resume", resume_command(folder)))
    overrides = record["overrides"]
    return {
        "key": str(record["id"]),
        "state": state,
        "error": redact(error),
        "started": text_or_none(record.get("started")),
        "ended": text_or_none(record.get("ended")),
        "seconds": None if seconds is None else finite_or_none("seconds", seconds),
        "words": redact(effective_overrides(overrides)) if isinstance(overrides, list) else {},
        "choices": recorded_choices(record.get("choices")),
        "metrics": {str(k): None if v is None else finite_or_none(f"metrics.{k}", v) for k, v in metrics.items()},
        "record": redact(to_json_data(record)),
        "commands": commands,
    }


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def finite_or_none(key: str, value: Any) -> float | None:
    """Return a number of a record; None if it is not finite.

    Raises:
        ValueError: it is not a number, or too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={str(value)[:40]} is no number")
    try:
        return value if math.isfinite(value) else None
    except OverflowError as error:
        raise ValueError(f"{key} is a number of {len(str(value))} digits") from error


def is_alive(record: Mapping[str, Any]) -> bool:
    """Return whether the run's process is alive; on another machine that is unknown, so the record is believed.

    Trying the run's lock would be more reliable, but would deny it to a process that takes it at that moment.
    """
    pid = record.get("pid")
    if record.get("host") != socket.gethostname() or not isinstance(pid, int) or os.name == "nt":
        return True
    try:
        os.kill(pid, 0)  # only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists, and belongs to another user
        pass
    # Process ids are reused after a reboot or a long time; the run's process started before the run did.
    with suppress(KeyError, IndexError, TypeError, ValueError, OSError):  # no /proc, or a damaged record
        started = str([record, *record.get("resumed", [])][-1]["started"])
        return process_start_time(pid) <= datetime.strptime(started, TIME_FORMAT).timestamp() + CLOCK_TOLERANCE
    return True


def process_start_time(pid: int) -> float:
    """Return the start time of a process in seconds since 1970, from /proc on Linux."""
    [boot] = (line for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines() if line.startswith("btime "))
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    ticks = stat.rpartition(")")[2].split()[19]  # the process name before it may have spaces
    return int(boot.split()[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")


def effective_overrides(overrides: list[Any]) -> dict[str, str]:
    """Return the overrides of a command that can change a result, by key."""
    found = {}
    for word in map(str, overrides):
        key, _, value = word.lstrip("+~").partition("=")
        if not key.startswith("hydra") and not without_effect(key):
            found[key] = value.strip("'\"")
    return found


def recorded_choices(choices: Any) -> dict[str, str]:
    """Return the choices of groups that can change a result, as typed on the command line."""
    if not isinstance(choices, Mapping):
        return {}
    typed = {str(k): f"[{','.join(map(str, v))}]" if isinstance(v, list) else v for k, v in choices.items()}
    return {k: str(v) for k, v in typed.items() if v is not None and not without_effect(k)}


def read_config_facts(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of config.yaml, and the choice of each group if the record has none."""
    if not (folder / "run.json").exists() and not (folder / "config.yaml").exists():
        return {}  # reported already, or the run ended before it wrote any
    content = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), Reader)
    check_size(content)
    check_keys(folder, "config.yaml", content, CONFIG)
    leaves = {
        k: to_json_data(v) for k, v in flat(content).items() if not any(fnmatch(k, pattern) for pattern in HIDDEN_KEYS)
    }
    classes = {
        str(group): class_name(node["_target_"])
        for group, node in content.items()
        if isinstance(node, Mapping) and "_target_" in node and group not in ("ablation", "trainer")
    }
    monitor = content.get("monitor")
    return {
        "config": redact(leaves),
        "choices": entry["choices"] or {group: entry["words"].get(group, name) for group, name in classes.items()},
        "monitor": text_or_none(monitor.get("metric")) if isinstance(monitor, Mapping) else None,
    }


def check_size(content: Any) -> None:
    """Refuse a config whose aliases expand to more values than any real config has.

    Raises:
        ValueError: the limit is exceeded.
    """
    todo, number = [content], 0
    while todo:
        node = todo.pop()
        number += 1
        if number > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        todo += node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple | set) else []


def class_name(target: Any) -> str:
    """Return the likely name of a choice for runs that did not record it: ablab.norms.GroupNorm is groupnorm."""
    return str(target).rpartition(".")[2].lower()


def to_json_data(value: Any) -> Any:
    """Return a value as plain data that JSON can represent."""
    if isinstance(value, Mapping):
        return {str(name): to_json_data(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"a number of {len(str(abs(value)))} digits"
    return value if value is None or isinstance(value, str | int | float) else str(value)


def steps_per_epoch(record: Mapping[str, Any]) -> float | None:
    """Return the steps per epoch of a run without validations, from its recorded data and batch sizes."""
    data, sizes = record.get("data"), record.get("batch_sizes")
    train = data.get("train") if isinstance(data, Mapping) else None
    size = sizes.get("optimizer") if isinstance(sizes, Mapping) else None
    return max(1, train // size) if isinstance(train, int) and isinstance(size, int) and size > 0 else None


def common_config(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Move values that most runs share out of their configs, which keeps a page of 500 configs small.

    Returns:
        The common values, and the keys that cannot change a result.
    """
    counts: dict[str, Counter[str]] = {}
    for entry in runs:
        for key, value in entry["config"].items():
            counts.setdefault(key, Counter())[json.dumps(value)] += 1
    base = {key: json.loads(of.most_common(1)[0][0]) for key, of in counts.items()}
    for entry in runs:
        config = entry["config"]
        entry["lacks"] = [key for key in base if key not in config] if config else None
        entry["config"] = {k: v for k, v in config.items() if (v, type(v)) != (base[k], type(base[k]))}
    return {"config": base, "without_effect": [key for key in base if without_effect(key)]}


# An ablation --------------------------------------------------------------------------------------------------------


def ablation_entry(folder: Path, root: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the page's data for an ablation: its question, verdicts and progress."""
    name = folder.absolute().name
    report = folder / "report" / "report.html"
    problems: list[str] = []
    entry: dict[str, Any] = {
        "name": name,
        "path": relpath(folder),
        "question": "",
        "command": "",
        "verdicts": [],
        "planned": 0,
        "missing": 0,
        "report": quote(os.fsencode(report.relative_to(root).as_posix())) if report.exists() else None,
        "report_command": f"python scripts/report.py {shlex.quote(relpath(folder))}",
        "problems": problems,
    }
    there = {run["name"] for run in runs if run["ablation"] == name}
    read_part(problems, folder / ABLATION, lambda: entry.update(read_ablation_facts(folder, there)))
    if (folder / "report" / "report.md").exists():
        read_part(
            problems,
            folder / "report" / "report.md",
            lambda: entry.update(verdicts=read_verdicts(folder / "report" / "report.md")),
        )
    return entry


def read_ablation_facts(folder: Path, there: set[str]) -> dict[str, Any]:
    """Return the facts of ablation.json."""
    content = json.loads((folder / ABLATION).read_text(encoding="utf-8"))
    try:
        tuning = content.get("tuning") or {"runs": []}
        planned = {str(planned["folder"]) for planned in [*content["runs"], *tuning["runs"]]}
        return {
            "question": redact(str(content["ablation"].get("question") or "")),
            "command": redact(str(content["command"])),
            "planned": len(planned),
            "missing": len(planned - there),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not what an ablation writes: {error!r}") from error


def read_verdicts(report: Path) -> list[str]:
    """Return the sentences of the section Verdict of a report."""
    _, _, after = report.read_text(encoding="utf-8").partition("\n## Verdict\n")
    lines = after.partition("\n## ")[0].splitlines()
    return [UNESCAPED.sub(r"\1", line.removeprefix("- ")) for line in lines if line.startswith("- ")]
