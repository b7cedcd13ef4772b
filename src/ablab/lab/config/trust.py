"""The kinds of objects that each group of the config may build, checked before any of them is built.

A config names classes and functions by import path, and building it calls them. A folder from somebody else must not be
able to call arbitrary code, so `check_targets` looks each target up without calling it, and accepts only subclasses of
the expected kind and functions annotated to return one.
"""

from __future__ import annotations

import inspect
import site
import sysconfig
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from ablab.errors import ConfigError
from ablab.lab.config.schema import HYDRA_KEYS, MULTIPLE_CHOICE_GROUPS, is_guest, show, source_file

# The base classes of the objects of each group, imported on use.
KINDS = {
    "model": ("torch.nn.Module",),
    "norm": ("ablab.norms.Norm",),
    "data": ("ablab.data.datamodule.DataModule",),
    "task": ("ablab.tasks.task.Task",),
    "optimizer": ("torch.optim.Optimizer",),
    "scheduler": ("torch.optim.lr_scheduler.LRScheduler", "ablab.optim.schedules.EpochScheduler"),
    "callbacks": ("lightning.pytorch.Callback",),
    "logger": ("lightning.pytorch.loggers.Logger",),
    "trainer": ("ablab.lab.trainer.Trainer",),
}
# For tasks that bring their own network.
GUESTS = {"task": ("lightning.LightningModule",), "data": ("lightning.LightningDataModule",)}
# Nested nodes whose parameter is annotated with a protocol, which any class might satisfy.
NESTED = {"model.qk_norm": "ablab.norms.Norm"}

Kinds = tuple[type, ...]  # empty: the accepted kinds are unknown


def check_targets(cfg: DictConfig) -> None:
    """Refuse a config with a target of an unexpected kind; nothing is called.

    With `trust=false`, as in a config from a run's folder, everything that is not known to be of that kind is refused:
    functions without a return annotation, nested nodes whose parameter has no annotation, and modules outside of
    packages. A config composed here (`trust=null`) may use these, and `trust=true` turns the check off.

    Raises:
        ConfigError: with a line for each refused target.
    """
    if cfg.trust not in (None, True, False):
        raise ConfigError(f"trust={show(cfg.trust)}: true, false or null is needed")
    if cfg.trust:
        return
    content: Any = OmegaConf.to_container(cfg, resolve=True)
    strict = cfg.trust is False
    lines: list[str] = []
    kinds = {**KINDS, **GUESTS} if is_guest(content) else KINDS
    for group, paths in kinds.items():
        nodes = content[group] or {}
        if group == "data" and nodes.get("_target_") is None:  # data=lightning, without a data module
            continue
        places = (
            {f"{group}.{name}": node for name, node in nodes.items()}
            if group in MULTIPLE_CHOICE_GROUPS
            else {group: nodes}
        )
        for place, node in places.items():
            lines += find_problems(node, tuple(map(get_object, paths)), place, strict=strict)
    if lines and strict:
        lines.append(
            "  a config from a run's folder builds only these kinds; if you trust that folder as you trust code, add "
            "trust=true (scripts: --trust)"
        )
    if lines:
        raise ConfigError("\n".join(lines))


def find_problems(node: Any, kinds: Kinds, place: str, *, strict: bool) -> Iterator[str]:
    """Yield the problems of a node and of all nested nodes, which Hydra builds first."""
    if isinstance(node, list):
        for i, child in enumerate(node):
            yield from find_problems(child, kinds, f"{place}[{i}]", strict=strict)
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    if target is not None and (problem := target_problem(target, kinds, strict=strict)) is not None:
        yield f"{place}._target_={show(target)}: {problem}"
        return  # the signature of a refused target says nothing about the nested nodes
    for key, child in node.items():
        if key in HYDRA_KEYS - {"_args_"} or not isinstance(child, dict | list):
            continue
        where = f"{place}.{key}"
        below = (
            kinds
            if target is None
            else kinds_of_annotation(find_annotation(import_target(target), str(key)), items=True)
        )
        yield from find_problems(
            child, (get_object(NESTED[where]),) if where in NESTED else below, where, strict=strict
        )


def target_problem(target: Any, kinds: Kinds, *, strict: bool) -> str | None:
    """Return the reason why a target is not of the accepted kinds; None if it is."""
    if not isinstance(target, str):
        return "a class or function is needed, package.module.Name"
    if strict and not kinds:
        return "nothing says which kind of object this place takes"
    if strict and not is_safe_to_import(target):
        return (
            "its module is neither installed nor in a package (folders with an __init__.py) outside of the folders of "
            "runs, and is not imported"
        )
    found = import_target(target)
    if found is None:
        return "it cannot be imported" if strict else None  # building it reports the reason
    wanted = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    if isinstance(found, type):
        return None if not kinds or issubclass(found, kinds) else f"a subclass of {wanted} is needed"
    returned = kinds_of_annotation(find_annotation(found, "return"))
    if (not returned and not strict) or (returned and all(issubclass(kind, kinds or object) for kind in returned)):
        return None
    return f"a subclass of {wanted} is needed, or a function annotated to return one"


def import_target(target: str) -> Any:
    """Import the class or function of a target; None if that fails."""
    try:
        return get_object(target)
    except (Exception, SystemExit):  # importing a module may raise anything
        return None


def is_safe_to_import(target: str) -> bool:
    """Return whether the module of a target is in a code folder rather than in one of data or runs.

    Python also imports from folders without an `__init__.py`, including the folders of runs.
    """
    file = source_file(target.rpartition(".")[0])
    if file is None:
        return False
    file = file.absolute()
    if any(file.is_relative_to(folder) for folder in code_folders()):
        return True
    depth = target.count(".") - (file.name != "__init__.py")  # number of enclosing packages
    packages = list(file.parents)[:depth]
    return all((folder / "__init__.py").is_file() for folder in packages) and not any(
        (folder / name).exists() for folder in file.parents for name in ("run.json", "ablation.json")
    )


def code_folders() -> list[Path]:
    """Return the folders of the standard library, of installed packages, and of this package."""
    names = [*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages()]
    return [Path(name) for name in (*names, site.getusersitepackages())] + [Path(__file__).parents[2]]


def find_annotation(target: Any, parameter: str) -> Any:
    """Return the type of a parameter or return value; None if it is unknown.

    A class that forwards `**settings` takes the parameters of its base classes.
    """
    parts = target.__mro__ if isinstance(target, type) else ()
    functions = (
        [vars(part)["__init__"] for part in parts if "__init__" in vars(part)] if parts else [inspect.unwrap(target)]
    )
    for function in functions:
        annotation = getattr(function, "__annotations__", {}).get(parameter)
        if annotation is not None:
            alone = SimpleNamespace(__annotations__={"it": annotation})
            try:
                return typing.get_type_hints(alone, globalns=getattr(function, "__globals__", {}))["it"]
            except Exception:  # a name imported only under TYPE_CHECKING
                return None
    return None


def kinds_of_annotation(annotation: Any, *, items: bool = False) -> Kinds:
    """Return the classes that an annotation allows, except None and plain types.

    Args:
        annotation: an evaluated annotation.
        items: use the item types of lists and dicts, and the return types of callables.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, typing.TypeVar):
        return kinds_of_annotation(annotation.__bound__, items=items)
    if origin in (typing.Union, types.UnionType, typing.Annotated) or (items and isinstance(origin, type)):
        return tuple(kind for argument in arguments for kind in kinds_of_annotation(argument, items=items))
    is_kind = isinstance(annotation, type) and annotation.__module__ not in ("builtins", "typing")
    return (annotation,) if is_kind and not getattr(annotation, "_is_protocol", False) else ()
