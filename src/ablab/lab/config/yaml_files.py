"""Read YAML files, with a readable message for every problem, before anything is built from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ablab.errors import ConfigError, first_line

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CONF = Path(__file__).parents[4] / "conf"
MAX_ALIASED_VALUES = 10_000  # values that aliases may add to a document; OmegaConf copies each of them several times
MAX_DEPTH = 100  # levels of nesting; Python's recursion ends at about 300
# Tags that OmegaConf accepts: plain data, and the paths that it writes itself.
TAGS = re.compile(r"tag:yaml\.org,2002:((str|int|float|bool|null|map|seq)|python/object/apply:pathlib\.\w+)")
ANCHOR, ALIAS = (
    re.compile(rb"(?:^|[\s:,\[{-])&[\w]", re.MULTILINE),
    re.compile(rb"(?:^|[\s:,\[{-])\*[\w]", re.MULTILINE),
)


@dataclass
class Node:
    """A mapping or sequence that is being parsed."""

    is_mapping: bool
    anchor: str | None
    line: int
    size: int = 1  # number of values, with aliases expanded
    num_children: int = 0
    keys: set[str] = field(default_factory=set)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as an OmegaConf config.

    Raises:
        ConfigError: describes the problem and its line.
    """
    check_yaml(path)
    try:
        return OmegaConf.load(path)
    except Exception as error:  # a number of 5,000 digits, for example
        raise ConfigError(f"{display_path(path)}: it cannot be read ({first_line(error)})") from error


def check_yaml(path: Path) -> None:
    """Refuse a YAML file that is not a single mapping of plain data, or would exhaust memory; nothing is built.

    Raises:
        ConfigError: describes the problem and its line.
    """
    for line, problem in find_problems(path):
        place = display_path(path) if line is None else f"{display_path(path)}, line {line}"
        raise ConfigError(f"{place}: {problem}")


def check_conf(folder: Path = CONF) -> None:
    """Refuse files of a config folder that Hydra would misread, or whose aliases are unsafe.

    Hydra ignores the `# @package` line of a file with a byte order mark, takes a single word for a key, and expands
    aliases without limit. Its other errors name the file, see `ablab.lab.config.errors`.

    Raises:
        ConfigError: for the first such file.
    """
    for path in sorted(folder.rglob("*.yaml")):
        try:
            content = path.read_bytes()
        except OSError:
            continue  # Hydra reports the error if it needs the file
        lines = [line for line in content.splitlines() if line.strip() and not line.lstrip().startswith(b"#")]
        is_no_mapping = bool(lines) and not any(b":" in line or b"{" in line for line in lines)
        if content.startswith(b"\xef\xbb\xbf") or is_no_mapping or (ANCHOR.search(content) and ALIAS.search(content)):
            check_yaml(path)


def find_problems(path: Path) -> Iterator[tuple[int | None, str]]:
    """Yield the problems of a file, each with its line; only the first one is shown."""
    try:
        content = path.read_bytes()
    except OSError as error:
        yield None, f"it cannot be read ({error.strerror})"
        return
    if content.startswith(b"\xef\xbb\xbf"):
        yield 1, "it begins with a byte order mark; save it as UTF-8 without one"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {content[error.start]:#04x} is not UTF-8"
        yield content.count(b"\n", 0, error.start) + 1, f"{byte}; save the file as UTF-8"
        return
    try:
        yield from event_problems(text)
    except yaml.MarkedYAMLError as error:
        yield syntax_problem(error, text)
    except yaml.reader.ReaderError as error:
        line = None if not isinstance(error.position, int) else text.count("\n", 0, error.position) + 1
        yield line, f"it has a character that YAML does not allow ({error.reason}); remove it"


def event_problems(text: str) -> Iterator[tuple[int | None, str]]:
    """Yield the problems of a document while it is parsed, without storing it or expanding aliases."""
    stack: list[Node] = []
    sizes: dict[str, int] = {}  # of the nodes with an anchor, with aliases expanded
    num_documents = num_written = 0
    for event in yaml.parse(text, Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                yield line, "a second document begins (---); keep one in a file"
                return
        if isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            size, anchor = done.size, done.anchor
        elif isinstance(event, yaml.NodeEvent):
            num_written += 1
            yield from node_problems(event, stack, sizes, line)
            anchor = event.anchor
            if isinstance(event, yaml.CollectionStartEvent):
                stack.append(Node(isinstance(event, yaml.MappingStartEvent), anchor, line))
                continue
            size, anchor = (sizes.get(anchor, 1), None) if isinstance(event, yaml.AliasEvent) else (1, anchor)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if stack:
            stack[-1].size += size
            stack[-1].num_children += 1
            if stack[-1].size > num_written + MAX_ALIASED_VALUES:
                yield (
                    line,
                    f"its aliases (*name) stand for more than {MAX_ALIASED_VALUES:,} values; write out what you need",
                )


def node_problems(
    event: yaml.NodeEvent, stack: list[Node], sizes: dict[str, int], line: int
) -> Iterator[tuple[int | None, str]]:
    """Yield the problems of a node at its start."""
    parent = stack[-1] if stack else None
    is_key = parent is not None and parent.is_mapping and parent.num_children % 2 == 0
    tag = getattr(event, "tag", None)
    if parent is None and not isinstance(event, yaml.MappingStartEvent) and getattr(event, "value", None) != "":
        yield line, "keys are needed at the top (key: value), and this is a list or a single value"
    if tag not in (None, "!") and not TAGS.fullmatch(tag):
        yield line, f"its tag {tag.replace('tag:yaml.org,2002:', '!!')} names no plain data; leave the tag out"
    if isinstance(event, yaml.AliasEvent) and any(node.anchor == event.anchor for node in stack):
        yield line, f"*{event.anchor} is part of what it stands for; write out what you need"
    elif isinstance(event, yaml.AliasEvent) and event.anchor not in sizes:
        yield line, f"*{event.anchor} stands for nothing; define it above (&{event.anchor}), or quote the text"
    if isinstance(event, yaml.CollectionStartEvent):
        if is_key:
            yield line, "a key is a list or a mapping; a text is needed"
        if len(stack) >= MAX_DEPTH:
            yield line, f"it is nested more than {MAX_DEPTH} levels deep"
    if is_key and isinstance(event, yaml.ScalarEvent):
        assert parent is not None
        if event.value in parent.keys:
            yield line, f"the key {event.value} is there twice; keep one"
        parent.keys.add(event.value)


def syntax_problem(error: yaml.MarkedYAMLError, text: str) -> tuple[int | None, str]:
    """Describe a syntax error, with its line and possible remedies."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1
    lines = text.splitlines()
    written = lines[line - 1] if line <= len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or "'\\t'" in str(error.problem):
        return line, "a tab indents it; use spaces"
    if line > len(lines) and error.context_mark is not None:  # an unclosed bracket or quote begins further up
        line = error.context_mark.line + 1
    reason = ", ".join(str(part) for part in (error.context, error.problem) if part)
    return line, f"{reason}; close brackets and quotes, put a space after each colon, indent with spaces"


def display_path(path: Path) -> str:
    """Return the shorter of the paths from the project and from the working directory."""
    for folder in (CONF.parent, Path.cwd()):
        if path.absolute().is_relative_to(folder):
            return os.path.relpath(path, folder)
    return str(path)
