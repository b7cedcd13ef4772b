"""SGD with decoupled learning rate, momentum and weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ablab.optim.groups import split_norm_parameters


class DecoupledSGD(torch.optim.SGD):
    """SGD with Nesterov momentum, in which momentum does not affect the step size, nor lr the weight decay.

    Under a constant gradient, torch's SGD takes steps of lr / (1 − momentum) times the gradient. This class passes it
    lr · (1 − momentum), and a weight decay that shrinks weights by the fraction `weight_decay` per step at the full
    learning rate. Gains and shifts of norms can have a larger learning rate with the same decay; all parameters decay.

    Args:
        params: parameter groups from `groups`.
        lr: factor between a constant gradient and the resulting step.
        momentum: Nesterov momentum.
        weight_decay: fraction of the weights that a step removes.
        norm_lr_scale: factor on the learning rate of norm parameters.
        fused: as in `torch.optim.SGD`.

    Raises:
        ValueError: a value is out of range.

    References:
        Page 2019, https://myrtle.ai/learn/how-to-train-your-resnet-5-hyperparameters; Jordan 2024,
        https://arxiv.org/abs/2404.00498
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.85,
        weight_decay: float = 0.0,
        norm_lr_scale: float = 1.0,
        fused: bool | None = None,
    ) -> None:
        if not (lr > 0 and norm_lr_scale > 0):
            raise ValueError(f"lr={lr}, norm_lr_scale={norm_lr_scale}: rates above 0 are needed")
        if not 0 < momentum < 1:
            raise ValueError(f"momentum={momentum}: a share of the past is needed, above 0 and below 1")
        plain = lr * (1 - momentum)
        groups = []
        for group in params:
            scale = norm_lr_scale if group.get("of_norms") else 1.0
            groups.append({**group, "lr": plain * scale, "weight_decay": weight_decay / lr / scale})
        super().__init__(groups, lr=plain, momentum=momentum, nesterov=True, fused=fused)

    @staticmethod
    def groups(model: nn.Module, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """Return two parameter groups: all parameters but those of norms, and those of norms."""
        norms, others = split_norm_parameters(model)
        return [{"params": others, "of_norms": False}, {"params": norms, "of_norms": True}]
