"""Muon: momentum whose matrices are made orthogonal before they are stepped along."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ablab.optim.groups import hidden_matrices
from ablab.optim.optimizer import groups_for

# of the odd polynomial a·x + b·x³ + c·x⁵, whose repeated use brings all singular values near 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


class Muon(Optimizer):
    """Steps whose singular values are all about 1, for the hidden layers' weights; another optimizer takes the rest.

    m ← momentum · m + (1 − momentum) · g, and with Nesterov's look ahead the step is along
    UVᵀ of momentum · m + (1 − momentum) · g = USVᵀ, times lr · sqrt(max(1, rows / columns)). A convolution is the
    matrix (out, in · kernel). Weight decay is decoupled. Biases, norms, embeddings, the first layer and the last go to
    `rest`, whose groups follow the hidden weights' in `param_groups`: schedules multiply the rates of both.

    Args:
        params: groups as from `groups`.
        rest: makes the optimizer of the other parameters.
        lr: the size of a step's singular values.
        momentum: decay of the average of gradients.
        nesterov: look ahead along it.
        weight_decay: of the hidden weights; `rest` has its own.
        ns_steps: Newton–Schulz iterations.
        fixed_norm: before each step, bring every matrix to the Frobenius norm of one with orthonormal rows, so that lr
            is a relative step.
        fused: what torch's fused optimizers do: one kernel for what `rest` has, and no step at all where an attribute
            `found_inf` is not 0.

    Raises:
        ValueError: a value out of range.

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self,
        params: Any,
        *,
        rest: Callable[..., Optimizer],
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        fixed_norm: bool = False,
        fused: bool | None = None,
    ) -> None:
        if ns_steps < 1:
            raise ValueError(f"ns_steps={ns_steps}: at least 1 iteration is needed")
        hidden, *others = params
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__([hidden], {**defaults, "ns_steps": ns_steps, "fixed_norm": fixed_norm, "fused": fused})
        self.found_inf: Tensor | None = None
        known = fused and getattr(rest, "keywords", {}).get("fused", False) is None
        self.rest = rest(others, fused=True) if known else rest(others)
        if hasattr(self.rest, "train"):
            raise ValueError(
                f"rest: {type(self.rest).__name__} evaluates other weights than it trains, which Muon does not; choose "
                "sgd or adamw"
            )
        self.share()

    @staticmethod
    def groups(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The hidden weights of a model, and the groups that `rest` would make of the others."""
        hidden = hidden_matrices(model)
        known = {id(parameter) for parameter in hidden}
        others = groups_for(settings["rest"], model)
        for group in others:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
        return [{"params": hidden}, *others]

    def share(self) -> None:
        """Have `rest` work on this optimizer's own groups and state, so that there is one of each to save."""
        self.param_groups = [self.param_groups[0], *self.rest.param_groups]
        self.rest.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rest": self.rest, "found_inf": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rest.param_groups = self.param_groups[1:]
        self.share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_hidden(self.param_groups[0])
        self.rest.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.rest.step()
        return loss

    def step_hidden(self, group: dict[str, Any]) -> None:
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad for p in weights]
        averages = [self.state[p]["momentum_buffer"] for p in weights]
        changed = [*weights, *averages]
        before = [] if self.found_inf is None else [tensor.clone() for tensor in changed]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        if group["fixed_norm"]:
            norms = torch._foreach_norm(weights)
            torch._foreach_div_(norms, [math.sqrt(len(p)) for p in weights])
            torch._foreach_div_(weights, norms)
        alike: dict[Any, list[int]] = defaultdict(list)  # matrices of one shape are made orthogonal together
        for i, p in enumerate(weights):
            alike[p.shape].append(i)
        for shape, numbers in alike.items():
            matrices = torch.stack([updates[i].flatten(1) for i in numbers])
            rows, columns = matrices.shape[1:]
            orthogonal = orthogonalized(matrices, group["ns_steps"]).to(matrices.dtype)
            size = group["lr"] * math.sqrt(max(1, rows / columns))
            torch._foreach_add_([weights[i] for i in numbers], list(orthogonal.reshape(-1, *shape)), alpha=-size)
        if self.found_inf is not None:
            for now, old in zip(changed, before, strict=True):
                now.copy_(torch.where(self.found_inf > 0, old, now))


def orthogonalized(matrices: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Each matrix's singular values brought near 1, by Newton–Schulz iterations.

    Args:
        matrices: of one shape.
        steps: iterations; after 5, singular values that were not tiny lie between about 0.7 and 1.2.
        dtype: to compute in; None is bfloat16 on GPUs, and the matrices' own on the CPU, where bfloat16 is slow.

    Shape:
        matrices `(N, rows, columns)`
    """
    a, b, c = COEFFICIENTS
    norms = matrices.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
    x = (matrices / norms).to(dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
