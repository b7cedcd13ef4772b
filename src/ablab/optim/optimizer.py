"""Build a model's optimizer from a partially configured optimizer class."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ablab.optim.groups import parameter_groups


def make_optimizer(factory: Callable[..., Optimizer], model: nn.Module, *, fused: bool = True) -> Optimizer:
    """Make an optimizer for the model's parameters, in groups with and without weight decay.

    Args:
        factory: a `functools.partial` of an optimizer class; its `weight_decay` applies to the decayed group. A class
            that needs other groups defines a static method `groups(model, settings)`.
        model: the model to train.
        fused: set `fused=True` if the settings have `fused=None` and all parameters are on a GPU.

    Raises:
        ValueError: a hyperparameter is negative, infinite or inconsistent, or a shared parameter is decayed by only one
            of its modules.
    """
    settings: dict[str, Any] = getattr(factory, "keywords", {})
    for name, value in settings.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}: a number is needed that is finite and not negative")
        shares = {"momentum": [value], "alpha": [value], "betas": value}.get(name, [])
        if any(not 0 <= share < 1 for share in shares):
            raise ValueError(f"{name}={value}: a share of the past is kept, at least 0 and below 1")
    if settings.get("nesterov") and settings.get("momentum", 0) == 0:
        raise ValueError("momentum=0, nesterov=true: Nesterov's is a momentum; set optimizer.nesterov=false")
    if (
        fused
        and settings.get("fused", False) is None
        and all(type(p.data) is Tensor and p.is_cuda for p in model.parameters())
    ):
        factory = partial(factory, fused=True)
    return factory(groups_for(factory, model))


def groups_for(factory: Callable[..., Optimizer], model: nn.Module) -> list[dict[str, Any]]:
    """Return the model's parameter groups for the optimizer that `factory` makes."""
    settings: dict[str, Any] = getattr(factory, "keywords", {})
    own = getattr(getattr(factory, "func", None), "groups", None)
    return parameter_groups(model, settings.get("weight_decay", 0.0)) if own is None else own(model, settings)
