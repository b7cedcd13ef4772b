"""How the heavy libraries are imported: without a look for garbage among what has been imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Import within.

    Imports make objects that stay, and as these pile up Python looks through all of them for garbage, time and again: a
    fifth of a run's start. Within it does not; afterwards they are set aside, so that no later look goes through them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()
