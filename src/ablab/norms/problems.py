"""Find invalid norms in a model from tensor shapes alone, without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ablab.norms.layer import NormLayer, UndefinedNorm
from ablab.norms.norm import Norm, builtin_norms, norm_layers
from ablab.norms.plain import NoNorm


def find_norm_problems(
    model: nn.Module, norm: Norm, predict: Callable[[], Any], *, num_processes: int = 1
) -> dict[str, list[str]]:
    """Return all problems with the norms of `model`, each with the names of the modules that have it.

    Args:
        model: a model built with `norm` within `collect_refusals`.
        norm: the factory.
        predict: passes a batch through the model; costs neither memory nor time on the meta device.
        num_processes: world size of the run to check.
    """
    found = unused_norm(model, norm)
    with record_problems(model, found, num_processes):
        predict()
    for reason, names in reparametrization_problems(model, norm).items():
        found.setdefault(reason, []).extend(names)
    return found


@contextmanager
def record_problems(model: nn.Module, found: dict[str, list[str]], num_processes: int) -> Iterator[None]:
    """Make norm layers record problems with their inputs and return the inputs unchanged."""

    def note(name: str, module: NormLayer | UndefinedNorm) -> Callable[..., Tensor]:
        def forward(x: Tensor, valid: Tensor | None = None, step: int | None = None) -> Tensor:
            mask = None if valid is None else valid.shape
            reason = (
                module.reason if isinstance(module, UndefinedNorm) else module.problem(x.shape, mask, num_processes)
            )
            names = found.setdefault(reason, []) if reason else []
            if name not in names:
                names.append(name)
            return x

        return forward

    layers = {name: module for name, module in model.named_modules() if isinstance(module, NormLayer | UndefinedNorm)}
    for name, layer in layers.items():
        layer.forward = note(name, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def unused_norm(model: nn.Module, norm: Norm) -> dict[str, list[str]]:
    """Return the problem that the model uses its norm nowhere, so that choosing a norm would have no effect."""
    if isinstance(norm, NoNorm) or norm_layers(model):
        return {}
    own = builtin_norms(model)
    keeps = (
        f"it keeps {', '.join(sorted({type(module).__name__ for module in own.values()}))}" if own else "it has none"
    )
    reason = (
        f"{type(norm).__name__} is in no place of this model: {keeps}; choose norm=none, or let the model build its "
        "norms with its argument norm"
    )
    return {reason: list(own) or [type(model).__name__]}


def reparametrization_problems(model: nn.Module, norm: Norm) -> dict[str, list[str]]:
    """Return problems of weight reparametrizations: no weight to reparametrize, or tied weights that it unties."""
    found: dict[str, list[str]] = {}
    wrapped = {name: module for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    owners = {id(p): name for name, p in model.named_parameters()}
    weight = norm.weight
    if not wrapped and norm.reparametrizes:
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
