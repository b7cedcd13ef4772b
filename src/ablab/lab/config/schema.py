"""Check the keys and types of a config against the signatures of its targets.

The schema of a YAML with a `_target_` is the signature of the constructor, read from its source without importing it:
a typo is reported at once, before torch is loaded, and a new class needs no separate schema.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import ablab.lab.config.monitor  # noqa: F401 (a resolver that conf/task/lightning.yaml uses)
from ablab.errors import ConfigError
from ablab.lab.config.errors import find_group, menu

PLAIN_WORD = re.compile(r"[\w./%*@?|+-]+")  # words that Hydra accepts without quotes
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
# optional packages, and their extra in pyproject.toml
OPTIONAL = {"lion_pytorch": "optim", "schedulefree": "optim", "tensorboard": "trackers", "mlflow": "trackers"}
OPTIONAL_GROUPS = ("model", "norm", "data", "optimizer", "scheduler")  # null if the task brings its own
NEEDED_BY = {
    "lightning.pytorch.loggers.TensorBoardLogger": "tensorboard",
    "lightning.pytorch.loggers.MLFlowLogger": "mlflow",
}
MULTIPLE_CHOICE_GROUPS = ("callbacks", "logger")  # groups that hold several named entries


@dataclass
class Signature:
    """The parameters of a class or function; `open` if it accepts any keyword."""

    name: str
    parameters: dict[str, ast.expr | None] = field(default_factory=dict)
    open: bool = False
    # its own docstring, then those of the functions that it forwards arguments to
    docstrings: list[str] = field(default_factory=list)


def is_guest(config: Any) -> bool:
    """Return whether a config uses an external LightningModule with its own network, as `task=lightning` does."""
    return config["model"] is None


def check_config(cfg: DictConfig, root: Path) -> None:
    """Refuse unknown keys and values of the wrong type, all in one message.

    Args:
        cfg: the composed config.
        root: the file of the root config: no other file may add top-level keys.

    Raises:
        ConfigError: with a line for each problem.
    """
    as_written: Any = OmegaConf.to_container(cfg)  # unresolved, since interpolations may refer to missing keys
    if problems := list(missing_problems(as_written, root)):
        raise ConfigError("\n".join(problems))
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    problems = [*top_level_problems(content, root), *choice_problems(content, root), *node_problems(content, "")]
    missing = [name for name in OmegaConf.missing_keys(cfg) if name.partition(".")[0] in content]
    problems += [f"{name}: it has no default; give one, {name}=…" for name in sorted(missing)]
    if problems:
        raise ConfigError("\n".join(problems))


@cache
def top_level(root: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the root config's own keys, and its groups."""
    declared: Any = OmegaConf.to_container(OmegaConf.load(root))
    entries = [str(key) for entry in declared.pop("defaults", []) if isinstance(entry, dict) for key in entry]
    # without `override …` entries, and groups that set nodes of other groups
    return declared, [
        entry for entry in entries if " " not in entry and entry not in ("experiment", "ablation", "debug", "scale")
    ]


def missing_problems(content: dict[Any, Any], root: Path) -> Iterator[str]:
    declared, groups = top_level(root)
    for key in [*declared, *groups]:
        if key not in content and key != "hydra":
            yield f"{key}: it is missing; a run needs one, so leave the ~{key} out"
    for key, default in declared.items():
        if isinstance(default, dict) and key in content and not isinstance(content[key], dict):
            yield f"{key}={show(content[key])}: it has the keys {', '.join(default)}; set them, {key}.{min(default)}=…"


def choice_problems(content: dict[Any, Any], root: Path) -> Iterator[str]:
    """Yield the problems of nodes that should hold a choice of a group, and hold something else."""
    for group in top_level(root)[1]:
        node = content[group]
        if node is None and is_guest(content) and group in OPTIONAL_GROUPS:
            continue
        if not isinstance(node, dict) or (group not in MULTIPLE_CHOICE_GROUPS and "_target_" not in node):
            yield f"{group}: it names no class to build; choose another, {choices_menu(root.parent / group)}"
        elif group in MULTIPLE_CHOICE_GROUPS:
            for name, entry in node.items():
                if entry is not None and not isinstance(entry, dict) and not (root.parent / group / name).is_dir():
                    yield f"{group}.{name}={show(entry)}: an entry with a _target_ is needed, or null to leave it out"
    for folder in sorted(path for path in root.parent.glob("*/[!_]*") if path.is_dir()):
        group, name = folder.parent.name, folder.name
        value = content[group].get(name) if isinstance(content.get(group), dict) else None
        if value is not None and not isinstance(value, dict):
            meant = choices_menu(folder, str(value))
            yield f"{group}.{name}={show(value)}: a choice is made with a slash, {find_group(name, group)}=…; {meant}"


def choices_menu(folder: Path, word: str = "") -> str:
    """Return the menu of a group, from its folder."""
    return menu(word, [file.stem for file in folder.glob("*.yaml")], folder.name)


def top_level_problems(content: dict[Any, Any], root: Path) -> Iterator[str]:
    declared, groups = top_level(root)
    keys = [*declared, *groups]
    for key, value in content.items():
        if key not in keys:
            meant = f"did you mean {word}? " if (word := find_group(str(key))) else ""
            yield f"{key}: there is no such key; {meant}{menu(str(key), keys, 'the top level')}"
            continue
        default = declared.get(key)
        if isinstance(default, dict) and isinstance(value, dict):
            for name in value.keys() - default.keys():
                yield f"{key}.{name}: there is no such key; {menu(name, [*default], key)}"
        if isinstance(default, bool | int | float | str) and not accepts(ast.Name(type(default).__name__), value):
            yield f"{key}={show(value)}: {describe_type(ast.Name(type(default).__name__))} is needed"


def node_problems(node: Any, place: str) -> Iterator[str]:
    """Yield the problems of a node and of all nested nodes."""
    if isinstance(node, list):
        for i, child in enumerate(node):
            yield from node_problems(child, f"{place}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node and not (place == "data" and node["_target_"] is None):  # data=lightning
        yield from call_problems(node, place)
    for key, child in node.items():
        where = f"{place}.{key}" if place else str(key)
        if place in MULTIPLE_CHOICE_GROUPS and isinstance(child, dict) and "_target_" not in child:
            yield f"{where}: there is no such entry to change; {menu(str(key), [k for k in node if k != key], place)}"
        yield from node_problems(child, where)


def call_problems(node: dict[Any, Any], place: str) -> Iterator[str]:
    """Yield the problems of a node with a `_target_`."""
    target = node["_target_"]
    if target == "???":
        return  # reported with the other missing values
    if not isinstance(target, str):
        yield f"{place}._target_={show(target)}: a class or function is needed, package.module.Name"
        return
    try:
        signature = read_signature(target)
    except LookupError as error:
        if extra := OPTIONAL.get(target.split(".")[0]):
            yield f"{place}: {target} needs a package that is not there; pip install -e '.[{extra}]', or choose another"
        else:
            yield f"{place}._target_={target}: {error.args[0]}; give the path of one, package.module.Name"
        return
    for package in missing_packages(target):
        yield f"{place}: it needs {package}, which is not installed; pip install -e '.[{OPTIONAL[package]}]'"
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        if key not in signature.parameters and not signature.open:
            choices = [name for name in signature.parameters if name not in HYDRA_KEYS]
            yield f"{place}.{key}: {signature.name} takes no such argument; {menu(key, choices, signature.name)}"
        elif not accepts(annotation := signature.parameters.get(key), value):
            yield f"{place}.{key}={show(value)}: {describe_type(annotation)} is needed"


# Reading signatures ------------------------------------------------------------------------------------------------


@cache
def read_signature(target: str) -> Signature:
    """Return the signature of a class or function, read from its source.

    Raises:
        LookupError: there is no such module or name.
    """
    module, _, name = target.rpartition(".")
    found = find_definition(module, name)
    if found is None or isinstance(found[0], ast.Assign):
        raise LookupError(f"there is no class or function {name} in {module or 'no module'}")
    node, where = found
    signature = Signature(name)
    if isinstance(node, ast.ClassDef):
        read_class(node, where, signature)
    elif isinstance(node, ast.FunctionDef):
        read_arguments(node, where, signature)
    return signature


def missing_packages(target: str) -> set[str]:
    """Return the optional packages that a class or function needs and that are not installed."""
    source = source_file(target.rpartition(".")[0])
    imports = [node for node in parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)] if source else []
    names = {
        name
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    packages = {name.partition(".")[0] for name in names if name} & OPTIONAL.keys()
    if target in NEEDED_BY:  # Lightning imports it when it builds the logger
        packages.add(NEEDED_BY[target])
    return {package for package in packages if importlib.util.find_spec(package) is None}


def read_class(node: ast.ClassDef, module: str, signature: Signature) -> None:
    """Add the constructor's parameters, and those of the base classes if it forwards `**kwargs`."""
    constructor = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    signature.docstrings.append(ast.get_docstring(node, clean=False) or "")
    if constructor is not None:
        read_arguments(constructor, module, signature)
        signature.parameters.pop("self", None)
        if not signature.open:
            return
    signature.open = False
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in ("ABC", "object"):
            continue  # no parameters
        found = find_definition(module, base.id) if isinstance(base, ast.Name) else None
        if found is not None and isinstance(found[0], ast.ClassDef):
            read_class(found[0], found[1], signature)
        else:
            signature.open = True  # a base class without readable source may accept anything


def read_arguments(node: ast.FunctionDef, module: str, signature: Signature) -> None:
    arguments = node.args
    signature.docstrings.append(ast.get_docstring(node, clean=False) or "")
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        signature.parameters.setdefault(argument.arg, resolve_aliases(argument.annotation, module))
    signature.open = arguments.kwarg is not None


def resolve_aliases(annotation: ast.expr | None, module: str) -> ast.expr | None:
    """Return an annotation with module-level type aliases (`Scope = Literal[…]`) replaced by their values."""
    return None if annotation is None else Aliases(module).visit(deepcopy(annotation))


class Aliases(ast.NodeTransformer):
    """Replaces the type aliases of a module by their values."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = None if node.id in TYPE_NAMES else find_definition(self.module, node.id, in_standard_library=False)
        if found is not None and isinstance(found[0], ast.Assign):
            value = found[0].value
            if isinstance(value, ast.Subscript | ast.BinOp):
                return resolve_aliases(value, found[1]) or value
        return node


@cache
def find_definition(
    module: str, name: str, *, in_standard_library: bool = True
) -> tuple[ast.ClassDef | ast.FunctionDef | ast.Assign, str] | None:
    """Return the definition of a name and its module, following re-exports.

    Args:
        module: the module that uses the name.
        name: of a class, a function or a value.
        in_standard_library: also search there. Its large modules are slow to parse, and the names that annotations use
            from them, such as Optional, Path or timedelta, are no aliases.
    """
    if not in_standard_library and module.partition(".")[0] in sys.stdlib_module_names:
        return None
    source = source_file(module)
    if source is None:
        return None
    for node in iter_statements(parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node, module
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return node, module
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
                    for _ in range(node.level - 1):
                        package = package.rpartition(".")[0]
                    origin = ".".join(filter(None, [package if node.level else "", node.module]))
                    if (origin, alias.name) == (module, name):
                        continue
                    if found := find_definition(origin, alias.name, in_standard_library=in_standard_library):
                        return found
    return None


@cache
def parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


def iter_statements(module: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module, including those inside `if` and `try`."""
    todo = list(module.body)
    while todo:
        node = todo.pop(0)
        yield node
        if isinstance(node, ast.If | ast.Try):
            todo = [*node.body, *node.orelse, *todo]


def source_file(module: str) -> Path | None:
    """Return the file of a module, found without importing the module or its packages."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top) if top else None
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]  # empty for a single-file module
    bases = [folder.joinpath(*rest) for folder in folders]
    candidates = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py")]
    if not rest:
        candidates = [Path(spec.origin)] if spec.origin else []
    return next((file for file in candidates if file.is_file()), None)


# Types -------------------------------------------------------------------------------------------------------------


def accepts(annotation: ast.expr | None, value: Any) -> bool:
    """Return whether a plain value fits an annotation; unknown annotations accept anything."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return accepts(ast.parse(text, mode="eval").body, value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return any(accepts(side, value) for side in typeable([left, right]))
        case ast.Subscript(value=ast.Name(id=name), slice=inner):
            parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
            if name == "Literal":
                return value in [part.value for part in parts if isinstance(part, ast.Constant)]
            if name in ("Optional", "Union"):
                return (name == "Optional" and value is None) or any(accepts(part, value) for part in typeable(parts))
            if name in ("list", "List", "Sequence"):
                return isinstance(value, list) and all(accepts(parts[0], item) for item in value)
            if name in ("tuple", "Tuple") and not any(isinstance(part, ast.Constant) for part in parts):
                fits = isinstance(value, list) and len(value) == len(parts)
                return fits and all(map(accepts, parts, value))
            return accepts(ast.Name(name), value)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # not nan
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="dict" | "Mapping"):
            return isinstance(value, dict)
        case ast.Name(id="tuple" | "Tuple" | "Sequence" | "list" | "List"):
            return isinstance(value, list)
        case _:
            return True


def typeable(sides: list[ast.expr]) -> list[ast.expr]:
    """Return the types of a union that can be typed on a command line: with a number, no objects (float | Tensor)."""
    if not any(ast.unparse(side) in ("int", "float") for side in sides):
        return sides
    return [side for side in sides if not isinstance(side, ast.Name | ast.Attribute) or ast.unparse(side) in TYPE_NAMES]


TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "None": "null",
}


def describe_type(annotation: ast.expr | None) -> str:
    """Describe an annotation in words."""
    match annotation:
        case ast.Constant(value=str(text)):
            return describe_type(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, right=right):
            return " or ".join(map(describe_type, typeable([left, right])))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            parts = list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]
            return " or ".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return f"{describe_type(inner)} or null"
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=parts)):
            return " or ".join(map(describe_type, typeable(parts)))
        case ast.Subscript(value=ast.Name(id="list" | "List" | "Sequence"), slice=inner):
            return f"a list, each item {describe_type(inner)}"
        case ast.Subscript(value=ast.Name(id="tuple" | "Tuple"), slice=ast.Tuple(elts=parts)):
            return f"a list of {len(parts)} ({', '.join(map(describe_type, parts))})"
        case None:
            return "another value"
        case _:
            text = ast.unparse(annotation)
            return TYPE_NAMES.get(text, text)


def show(value: Any) -> str:
    """Return a value as YAML writes it."""
    words = [(None, "null"), (True, "true"), (False, "false")]
    return next((word for known, word in words if value is known), str(value))


def quote_value(value: Any) -> str:
    """Return a value quoted for Hydra's command line."""
    if isinstance(value, list):
        return f"[{','.join(map(quote_value, value))}]"
    text = show(value)
    return text if PLAIN_WORD.fullmatch(text) else "'" + text.replace("'", "\\'") + "'"
