"""JSON Schemas of the YAMLs in conf/, which editors use for completion and checks.

They are derived from the signatures that `ablab.lab.config.schema` checks: one schema for each folder of conf/, and one
for train.yaml. A class that is newer than the schemas accepts any argument.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml
from omegaconf import MISSING

from ablab.lab.config.schema import (
    MULTIPLE_CHOICE_GROUPS,
    OPTIONAL_GROUPS,
    Signature,
    read_signature,
    top_level,
    typeable,
)

Schema = dict[str, Any]

JSON_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}
REFERENCE: Schema = {"$ref": "#/definitions/reference"}
COMMON_DEFINITIONS: Schema = {
    # an interpolation ${…} may have any type, and ??? is a missing value
    "reference": {"type": "string", "pattern": r"^\?\?\?$|\$\{"},
    # keys of Hydra beside the arguments of a class
    "_partial_": {"type": "boolean", "description": "true: stays a function, to be called with the rest later"},
    "_convert_": {"enum": ["none", "partial", "object", "all"]},
    "_recursive_": {"type": "boolean"},
    "_args_": {"type": "array"},
}
BESIDE = ("defaults", "_partial_", "_convert_", "_recursive_", "_args_")


def write_schemas(conf: Path, folder: Path) -> list[Path]:
    """Write the schemas of a config folder: `norm.json` for conf/norm, `norm.weight.json` for conf/norm/weight.

    Args:
        conf: the config folder.
        folder: the folder to write to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, schema in build_schemas(conf).items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(file)
    return written


def build_schemas(conf: Path) -> dict[str, Schema]:
    """Return the schema of each folder of a config folder, by its dotted name; `train` is the root config."""
    definitions = Definitions(conf)
    found = {}
    for folder in sorted({file.parent for file in conf.rglob("*.yaml")}):
        name = "train" if folder == conf else dotted_name(conf, folder)
        schema = definitions.root_schema() if folder == conf else definitions.folder_schema(folder)
        used = dict(definitions.definitions_used_by(schema))
        found[name] = {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "definitions": used}
    return found


class Definitions:
    """Definitions that schemas refer to, created on demand: for groups, and for the classes of their choices.

    Args:
        conf: the config folder.
    """

    def __init__(self, conf: Path) -> None:
        self.conf = conf
        self.definitions: dict[str, Schema] = {**COMMON_DEFINITIONS, "defaults": self.defaults_schema()}

    def definitions_used_by(self, schema: Schema, known: frozenset[str] = frozenset()) -> Iterator[tuple[str, Schema]]:
        """Yield the definitions that a schema refers to, directly and indirectly."""
        names = set(re.findall(r'"#/definitions/(.*?)"', json.dumps(schema)))
        if new := names - known:
            inner = [self.definitions[name] for name in sorted(new)]
            nested = dict(self.definitions_used_by({"all": inner}, known | names))
            yield from sorted({**nested, **dict(zip(sorted(new), inner, strict=True))}.items())

    def folder_schema(self, folder: Path) -> Schema:
        """Return the schema of the files of a folder, whose `# @package` line names the node that they set."""
        if folder.name.startswith("_"):
            return self.folder_schema(folder.parent)  # shared parts of its choices
        package = declared_package(folder)
        if package == "_global_":
            return self.root_schema()
        return self.group_reference(self.conf / package if package else folder)

    def root_schema(self) -> Schema:
        """Return the schema of the root config, and of files that may set all of it, such as experiments."""
        declared, groups = top_level(self.conf / "train.yaml")
        described = key_comments(self.conf / "train.yaml")
        properties = {
            "defaults": reference("defaults"),
            "hydra": {"type": "object", "description": "Hydra's own settings"},
        }
        for key, default in declared.items():
            properties.setdefault(key, with_description(schema_of_default(default), described.get(key)))
        for group in groups:
            node = self.group_reference(self.conf / group)
            properties[group] = nullable(node) if group in OPTIONAL_GROUPS else node
        properties["ablation"] = {"anyOf": [{"type": "null"}, self.group_reference(self.conf / "ablation")]}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def group_reference(self, folder: Path) -> Schema:
        """Return a reference to the definition of a group, created if it is new."""
        name = dotted_name(self.conf, folder)
        if name not in self.definitions:
            targets = group_targets(folder)
            every = self.node_schema(folder, sorted({target for _, target in targets}))
            if name in MULTIPLE_CHOICE_GROUPS:
                entries = {entry: nullable(self.node_schema(folder, [target])) for entry, target in targets}
                every = {
                    "type": "object",
                    "properties": {"defaults": reference("defaults"), **entries},
                    "additionalProperties": nullable(every),
                }
            self.definitions[name] = every
        return reference(name)

    def node_schema(self, folder: Path, targets: list[str]) -> Schema:
        """Return the schema of a node that names one of several classes, any other class, or none."""
        choices = [self.arguments_name(folder, target) for target in targets]
        named = {
            "anyOf": [{"enum": targets}, {"type": ["string", "null"]}],
            "description": "the class, package.module.Name",
        }
        cases = [
            {"if": {"properties": {"_target_": {"const": target}}, "required": ["_target_"]}, "then": reference(choice)}
            for target, choice in zip(targets, choices, strict=True)
        ]
        return {
            "type": "object",
            "properties": {"_target_": named},
            "allOf": [
                *cases,
                {
                    "if": {"not": {"required": ["_target_"]}},
                    "then": merge_arguments([self.definitions[choice] for choice in choices]),
                },
            ],
        }

    def arguments_name(self, folder: Path, target: str) -> str:
        """Return the name of the definition of a class's arguments in a group, created if it is new."""
        name = f"{dotted_name(self.conf, folder)}:{target}"
        if name not in self.definitions:
            try:
                signature = read_signature(target)
            except LookupError:  # of a package that is not installed
                signature = Signature(target, open=True)
            described = {**group_comments(folder), **docstring_descriptions(signature)}
            properties = {
                "_target_": {},
                **{word: reference(word) for word in ("defaults", *COMMON_DEFINITIONS) if word != "reference"},
            }
            for parameter, annotation in signature.parameters.items():
                inner = folder / parameter
                schema = self.group_reference(inner) if inner.is_dir() else or_interpolation(schema_of_type(annotation))
                properties[parameter] = with_description(schema, described.get(parameter))
            # Hydra checks its own groups
            is_open = signature.open or folder.is_relative_to(self.conf / "hydra")
            self.definitions[name] = {"properties": properties, "additionalProperties": is_open}
        return name

    def defaults_schema(self) -> Schema:
        """Return the schema of Hydra's defaults list: it offers known choices and accepts others."""
        choices = {}
        for folder in sorted({file.parent for file in self.conf.rglob("[!_]*/*.yaml")}):
            group, names = folder.relative_to(self.conf).as_posix(), sorted(file.stem for file in folder.glob("*.yaml"))
            for key in (f"override /{group}", group if folder.parent == self.conf else folder.name):
                choices[key] = {"anyOf": [{"enum": names}, {}]}
        entry = {"anyOf": [{"enum": ["_self_"]}, {"type": "string"}, {"type": "object", "properties": choices}]}
        return {"type": "array", "items": entry, "description": "what this builds upon; _self_ stands for its own keys"}


def dotted_name(conf: Path, folder: Path) -> str:
    return ".".join(folder.relative_to(conf).parts)


def reference(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, schema]}


def with_description(schema: Schema, text: str | None) -> Schema:
    """Return a schema with a description for editors; draft 7 ignores keys beside a $ref."""
    if text is None:
        return schema
    return {"allOf": [schema], "description": text} if "$ref" in schema else {**schema, "description": text}


def merge_arguments(choices: list[Schema]) -> Schema:
    """Return a schema of the arguments of several classes, each with the types of any of them."""
    properties: dict[str, Schema] = {}
    for choice in choices:
        for key, schema in choice["properties"].items():
            known = properties.setdefault(key, schema)
            if without_description(known) != without_description(schema):
                properties[key] = with_description(any_of([known, schema]), known.get("description"))
    return {"properties": properties, "additionalProperties": any(choice["additionalProperties"] for choice in choices)}


def without_description(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != "description"}


# Types -------------------------------------------------------------------------------------------------------------


def schema_of_default(default: Any) -> Schema:
    """Return the schema of a value of the root config, from its default."""
    if isinstance(default, dict):
        properties = {key: schema_of_default(value) for key, value in default.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    return {} if default in (None, "???") else or_interpolation({"type": JSON_TYPES[type(default).__name__]})


def schema_of_type(annotation: ast.expr | None) -> Schema:
    """Return an annotation as a schema that accepts the same values as `ablab.lab.config.schema.accepts`."""
    match annotation:
        case ast.Constant(value=None):
            return {"type": "null"}
        case ast.Constant(value=str(text)):
            return schema_of_type(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return any_of([schema_of_type(side) for side in typeable([left, right])])
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
            if name == "Literal":
                return {"enum": [part.value for part in parts if isinstance(part, ast.Constant)]}
            if name in ("Optional", "Union"):
                sides = [schema_of_type(part) for part in typeable(parts)]
                return any_of([*sides, *([{"type": "null"}] if name == "Optional" else [])])
            if name in ("list", "List", "Sequence"):
                return {"type": "array", "items": or_interpolation(schema_of_type(parts[0]))}
            if name in ("tuple", "Tuple") and not any(isinstance(part, ast.Constant) for part in parts):
                items = [or_interpolation(schema_of_type(part)) for part in parts]
                return {"type": "array", "items": items, "minItems": len(parts), "maxItems": len(parts)}
            return schema_of_type(ast.Name(name))
        case ast.Name(id="bool" | "int" | "float" | "str" as name):
            return {"type": JSON_TYPES[name]}
        case ast.Name(id="dict" | "Mapping"):
            return {"type": "object"}
        case ast.Name(id="tuple" | "Tuple" | "Sequence" | "list" | "List"):
            return {"type": "array"}
        case _:
            return {}


def any_of(sides: list[Schema]) -> Schema:
    """Return a schema that accepts what one of several accepts; without constraints if one of them has none."""
    parts: list[Schema] = []
    for side in map(without_description, sides):
        parts += [part for part in side.get("anyOf", [side]) if part not in parts]
    return {"anyOf": parts} if all(parts) else {}


def or_interpolation(schema: Schema) -> Schema:
    """Return a schema that also accepts interpolations."""
    return any_of([schema, REFERENCE])


# Files -------------------------------------------------------------------------------------------------------------


def load_yamls(folder: Path) -> dict[Path, Any]:
    """Return the content of the YAMLs of a folder."""
    return {file: yaml.safe_load(file.read_text(encoding="utf-8")) or {} for file in sorted(folder.glob("*.yaml"))}


def declared_package(folder: Path) -> str | None:
    """Return the package that the files of a folder declare; None for the default, the place of the folder."""
    for file in sorted(folder.glob("*.yaml")):
        if found := re.match(r"# @package (\S+)", file.read_text(encoding="utf-8")):
            return found[1]
    return None


def group_targets(folder: Path) -> list[tuple[str, str]]:
    """Return the classes of the choices of a group, with the names of their entries in multiple-choice groups."""
    inner = [
        path for path in sorted(folder.glob("[!_]*/")) if declared_package(path) == folder.name
    ]  # callbacks/measure
    found: list[tuple[str, str]] = []
    for content in (content for place in [folder, *inner] for content in load_yamls(place).values()):
        entries = content if folder.name in MULTIPLE_CHOICE_GROUPS else {"": content.get(folder.name, content)}
        for name, entry in entries.items():
            if isinstance(entry, dict) and isinstance(target := entry.get("_target_"), str) and target != MISSING:
                found.append((name, target))
    return found


@cache
def group_comments(folder: Path) -> dict[str, str]:
    """Return the comments on keys in the files of a group; the first file with a comment wins."""
    found: dict[str, str] = {}
    for file in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("_*/*.yaml"))]:
        found = {**key_comments(file), **found}
    return found


def key_comments(file: Path) -> dict[str, str]:
    """Return the comment behind each key of a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {found[1]: found[2] for line in lines if (found := re.match(r" *(\w+):.*\s# (.+)", line))}


def docstring_descriptions(signature: Signature) -> dict[str, str]:
    """Return the descriptions of arguments in `Args` sections; the docstring closest to the class wins."""
    found: dict[str, str] = {}
    for text in signature.docstrings:
        _, _, rest = cleandoc(text).partition("Args:\n")
        section = dedent(re.split(r"^(?=\S)", rest, maxsplit=1, flags=re.MULTILINE)[0])
        for entry in re.split(r"^(?=\S)", section, flags=re.MULTILINE):
            of_one = re.match(r"([\w, *]+?)(?: ?\(.*?\))?:\s+(.*)", " ".join(entry.split()))
            if of_one is not None and not of_one[2].startswith("see "):
                for name in of_one[1].split(", "):
                    found.setdefault(name, of_one[2])
    return found
