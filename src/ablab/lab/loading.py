"""Faster imports of heavy libraries: parts that training does not need are deferred, and garbage collection is off.

`from lightning...` runs all of torchmetrics, which imports matplotlib for the type annotations of its plots, and
scipy.signal for audio metrics: an eighth of the time to a run's first step. These two modules are imported on first
use. If torchmetrics changes, they are used at once, and everything works as without this file.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from operator import attrgetter
from types import ModuleType
from typing import Any

from ablab.status import is_enabled

# The names that torchmetrics imports from each module, and their places in it. The types are only used in annotations;
# torchmetrics itself uses `object` for them without matplotlib.
DEFERRED: dict[str, dict[str, Any]] = {
    "scipy.signal": {"hamming": "windows.hamming"},  # torchmetrics restores this old alias of SciPy
    "torchmetrics.utilities.plot": {
        **dict.fromkeys(("_AX_TYPE", "_PLOT_OUT_TYPE", "_CMAP_TYPE"), object),
        **{name: name for name in ("plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val")},
    },
}

lock = threading.RLock()


@contextmanager
def loading(*, announce: bool = False) -> Iterator[None]:
    """Import heavy libraries inside this context.

    Imports create many objects that stay, and Python's garbage collector scans all of them again and again: a fifth of
    a run's start, so a program turns it off as it begins. It is turned on after the imports, and skips their objects.

    Args:
        announce: print a line, since a person waits for the imports.
    """
    if announce and is_enabled() and "lightning" not in sys.modules:
        print("loading torch and Lightning", flush=True)
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if not gc.isenabled():  # only the first time: later, live objects may include garbage
            gc.freeze()
            gc.enable()


class Finder(MetaPathFinder):
    """Finds the modules of `DEFERRED` in the usual way, and defers their execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = DeferringLoader(spec.loader)
        return spec


class DeferringLoader(Loader):
    """Creates a `LazyModule` that another loader will execute."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return LazyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        module.__spec__.loader_state = self
        vars(module).pop("__path__", None)  # `__getattr__` then sees the import of a submodule
        for name, known in DEFERRED[module.__name__].items():
            vars(module)[name] = forward_call(module, known) if isinstance(known, str) else known


class LazyModule(ModuleType):
    """A module whose code runs on the first access to a missing attribute.

    The standard library's LazyLoader does not work here: it executes a module that is imported twice.
    """

    def __getattr__(self, name: str) -> Any:
        spec: Any = self.__spec__
        of_a_package = name == "__path__" and spec.submodule_search_locations is not None
        if name.startswith("__") and name != "__all__" and not of_a_package:
            raise AttributeError(name)  # Python looks these up on every module
        load_now(self)
        return super().__getattribute__(name)


def load_now(module: ModuleType) -> None:
    """Execute a deferred module, unless it has been executed."""
    spec: Any = module.__spec__
    with lock:
        waiting, spec.loader_state = spec.loader_state, None
        if not isinstance(waiting, DeferringLoader):
            return
        if spec.submodule_search_locations is not None:
            vars(module)["__path__"] = spec.submodule_search_locations
        try:
            spec.loader.exec_module(module)
        except BaseException:
            spec.loader_state = waiting
            raise


def forward_call(module: ModuleType, place: str) -> Callable[..., Any]:
    """Return a function that calls the function at a path in the module."""

    def function(*arguments: Any, **settings: Any) -> Any:
        load_now(module)
        return attrgetter(place)(module)(*arguments, **settings)

    return function
