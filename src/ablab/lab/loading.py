"""How the heavy libraries are imported: without what a training does not use, and without a look for garbage meanwhile.

`from lightning...` runs all of torchmetrics, which imports matplotlib, for the types in the signatures of its metrics'
plots, and scipy.signal, for metrics of audio: an eighth of the time until a run's first step. These two modules are
imported when somebody asks something of them. Where torchmetrics changes, they are asked at once, and all is as it
would be without this file.
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

# What torchmetrics asks of them while it is imported, and where it is found once somebody wants it. The types stand in
# annotations; `object` is what torchmetrics itself puts there without matplotlib.
ASKED: dict[str, dict[str, Any]] = {
    "scipy.signal": {"hamming": "windows.hamming"},  # torchmetrics gives SciPy this old name back
    "torchmetrics.utilities.plot": {
        **dict.fromkeys(("_AX_TYPE", "_PLOT_OUT_TYPE", "_CMAP_TYPE"), object),
        **{name: name for name in ("plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val")},
    },
}

lock = threading.RLock()


@contextmanager
def loading(*, said: bool = False) -> Iterator[None]:
    """Import within.

    Imports make objects that stay, and as these pile up Python looks through all of them for garbage, time and again:
    a fifth of a run's start, so a program turns that off as it begins. Behind this it is on, and passes over them.

    Args:
        said: a person waits meanwhile, and is told.
    """
    if said and is_enabled() and "lightning" not in sys.modules:
        print("loading torch and Lightning", flush=True)
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if not gc.isenabled():  # the first time: later, what there is may be garbage
            gc.freeze()
            gc.enable()


class Finder(MetaPathFinder):
    """Finds the modules of `ASKED` as everybody does, and has them wait."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in ASKED else None
        if spec is not None and spec.loader is not None:
            spec.loader = Waiting(spec.loader)
        return spec


class Waiting(Loader):
    """Makes a module `Later` that another loader will fill."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Later(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        module.__spec__.loader_state = self
        vars(module).pop("__path__", None)  # a submodule asks for it first
        for name, known in ASKED[module.__name__].items():
            vars(module)[name] = passed_on(module, known) if isinstance(known, str) else known


class Later(ModuleType):
    """A module whose code runs when something is asked of it that is not there yet.

    The standard library's LazyLoader does not serve: its modules are imported as soon as they are imported twice.
    """

    def __getattr__(self, name: str) -> Any:
        spec: Any = self.__spec__
        of_a_package = name == "__path__" and spec.submodule_search_locations is not None
        if name.startswith("__") and name != "__all__" and not of_a_package:
            raise AttributeError(name)  # Python itself asks, of every module
        fill(self)
        return super().__getattribute__(name)


def fill(module: ModuleType) -> None:
    """Import it now, unless it has been."""
    spec: Any = module.__spec__
    with lock:
        waiting, spec.loader_state = spec.loader_state, None
        if not isinstance(waiting, Waiting):
            return
        if spec.submodule_search_locations is not None:
            vars(module)["__path__"] = spec.submodule_search_locations
        try:
            spec.loader.exec_module(module)
        except BaseException:
            spec.loader_state = waiting
            raise


def passed_on(module: ModuleType, place: str) -> Callable[..., Any]:
    """A function that is the one at a place in the module, once it is called."""

    def function(*arguments: Any, **settings: Any) -> Any:
        fill(module)
        return attrgetter(place)(module)(*arguments, **settings)

    return function
