"""What is wrong with the norms of a model, found without a batch's numbers: shapes are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ablab.norms.layer import NormLayer, Refused
from ablab.norms.norm import Norm, own_norms, places
from ablab.norms.plain import NoNorm


def problems(
    model: nn.Module, norm: Norm, predict: Callable[[], Any], *, num_processes: int = 1
) -> dict[str, list[str]]:
    """Everything that is wrong with the norms of `model`, each problem with the names of its places.

    Args:
        model: built with `norm`, within `collecting`.
        norm: the factory.
        predict: passes a batch through the model; on the meta device this costs no memory and no time.
        num_processes: of the run that is to come.
    """
    found = without_place(model, norm)
    with recorded(model, found, num_processes):
        predict()
    for reason, names in of_weights(model, norm).items():
        found.setdefault(reason, []).extend(names)
    return found


@contextmanager
def recorded(model: nn.Module, found: dict[str, list[str]], num_processes: int) -> Iterator[None]:
    """Let norm layers note what is wrong with their inputs and hand them on."""

    def note(name: str, module: NormLayer | Refused) -> Callable[..., Tensor]:
        def forward(x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
            mask = None if valid is None else valid.shape
            reason = module.reason if isinstance(module, Refused) else module.problem(x.shape, mask, num_processes)
            names = found.setdefault(reason, []) if reason else []
            if name not in names:
                names.append(name)
            return x

        return forward

    layers = {name: module for name, module in model.named_modules() if isinstance(module, NormLayer | Refused)}
    for name, layer in layers.items():
        layer.forward = note(name, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def without_place(model: nn.Module, norm: Norm) -> dict[str, list[str]]:
    """A norm that no layer of the model is, so that it would be recorded and change nothing."""
    if isinstance(norm, NoNorm) or places(model):
        return {}
    own = own_norms(model)
    keeps = (
        f"it keeps {', '.join(sorted({type(module).__name__ for module in own.values()}))}" if own else "it has none"
    )
    reason = (
        f"{type(norm).__name__} is in no place of this model: {keeps}; choose norm=none, or let the model build its "
        "norms with its argument norm"
    )
    return {reason: list(own) or [type(model).__name__]}


def of_weights(model: nn.Module, norm: Norm) -> dict[str, list[str]]:
    """A reparametrization that found nothing to do, and weights that it took away from those they were shared with."""
    found: dict[str, list[str]] = {}
    wrapped = {name: module for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    owners = {id(p): name for name, p in model.named_parameters()}
    weight = norm.weight
    if not wrapped and norm.wraps:
        found[
            f"norm/weight: {weight.title} is for {weight.kinds}, and this model has none; choose norm/weight=none"
        ] = [type(model).__name__]
    for name, module in wrapped.items():
        for step in module.parametrizations.weight:
            replaced = getattr(step, "replaced", None)
            owner = owners.get(id(replaced())) if replaced and replaced() is not None else None
            if owner is not None:
                reason = (
                    f"{weight.title} makes parameters of its own out of the weight that is shared with {owner}, and so "
                    "unties them; share none, or choose norm/weight=none"
                )
                found.setdefault(reason, []).append(name)
    return found
