"""Muon: momentum updates orthogonalize by Newton–Schulz iterations."""

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

# Coefficients of the polynomial a·x + b·x³ + c·x⁵, whose iteration moves all singular values towards 1 (Jordan et al.).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


class Muon(Optimizer):
    """Muon for the hidden layers' weights, with another optimizer, `rest`, for all other parameters.

    m ← momentum · m + (1 − momentum) · g. With Nesterov momentum, the update is UVᵀ, where
    USVᵀ = momentum · m + (1 − momentum) · g is a singular value decomposition, times lr · sqrt(max(1, rows / columns)).
    A convolution's weight is the matrix (out, in · kernel). Weight decay is decoupled. `rest` gets biases, norms,
    embeddings, the first and the last layer. `param_groups` lists the hidden weights first, then the groups of `rest`,
    so that schedules scale the learning rates of both.

    Args:
        params: parameter groups from `groups`.
        rest: factory of the optimizer of the other parameters.
        lr: learning rate, the size of the update's singular values.
        momentum: decay of the gradient average.
        nesterov: use Nesterov momentum.
        weight_decay: weight decay of the hidden weights; `rest` has its own.
        ns_steps: number of Newton–Schulz iterations.
        fixed_norm: before each step, scale every matrix to the Frobenius norm of one with orthonormal rows, which makes
            lr a relative step size.
        fused: use the fused kernel of `rest`, and skip the step while the attribute `found_inf` is not 0, as torch's
            fused optimizers do.

    Raises:
        ValueError: a value is out of range, or `rest` keeps separate weights for evaluation.

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
        self.share_state()

    @staticmethod
    def groups(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the group of a model's hidden weights, then the groups that `rest` makes of all other parameters."""
        hidden = hidden_matrices(model)
        known = {id(parameter) for parameter in hidden}
        others = groups_for(settings["rest"], model)
        for group in others:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in known]
        return [{"params": hidden}, *others]

    def share_state(self) -> None:
        """Let `rest` use this optimizer's `param_groups` and `state`, so that one state dict covers both."""
        self.param_groups = [self.param_groups[0], *self.rest.param_groups]
        self.rest.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rest": self.rest, "found_inf": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.rest.param_groups = self.param_groups[1:]
        self.share_state()

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
        by_shape: dict[Any, list[int]] = defaultdict(list)  # matrices of one shape are orthogonalize in one batch
        for i, p in enumerate(weights):
            by_shape[p.shape].append(i)
        for shape, numbers in by_shape.items():
            matrices = torch.stack([updates[i].flatten(1) for i in numbers])
            rows, columns = matrices.shape[1:]
            orthogonal = orthogonalize(matrices, group["ns_steps"]).to(matrices.dtype)
            size = group["lr"] * math.sqrt(max(1, rows / columns))
            torch._foreach_add_([weights[i] for i in numbers], list(orthogonal.reshape(-1, *shape)), alpha=-size)
        if self.found_inf is not None:
            for now, old in zip(changed, before, strict=True):
                now.copy_(torch.where(self.found_inf > 0, old, now))


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return approximate nearest orthogonal matrices, by Newton–Schulz iterations.

    Args:
        matrices: a batch of matrices.
        steps: number of iterations; after 5, all but tiny singular values lie between about 0.7 and 1.2.
        dtype: dtype of the computation; None is bfloat16 on GPUs and the input's dtype on CPUs, where bfloat16 is slow.

    Shape:
        matrices `(N, rows, columns)` -> `(N, rows, columns)`
    """
    a, b, c = COEFFICIENTS
    norms = matrices.flatten(1).norm(dim=1).clamp(min=EPS)[:, None, None]
    x = (matrices / norms).to(dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
