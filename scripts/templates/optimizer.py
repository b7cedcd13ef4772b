"""An optimizer of your own: SGD with momentum, written out, as a starting point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Template(Optimizer):
    """Steps along a decaying sum of gradients.

    g ← g + weight_decay · w, m ← momentum · m + g, w ← w − lr · m. Its steps equal those of torch.optim.SGD to the
    bit.

    To make it yours, change `update`. Its `state` is saved and resumed; a schedule changes `group["lr"]`.
    The parameters come in two groups, one of which has weight_decay 0: biases, embeddings and parameters of norms. An
    argument of the constructor is a key of the YAML, conf/optimizer/template.yaml.

    Args:
        params: parameters, or groups of them.
        lr: multiplies each step.
        momentum: the decay of the sum per step, at least 0 and below 1.
        weight_decay: L2.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"lr={lr}, weight_decay={weight_decay}: numbers that are not negative are needed")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: a share of the past is kept, at least 0 and below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, weight.grad, self.state[weight], group)
        return loss

    def update(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update one weight in place."""
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        gradient = gradient.add(weight, alpha=group["weight_decay"])
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        weight.sub_(momentum, alpha=group["lr"])
