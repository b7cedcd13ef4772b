"""SGD whose rate, momentum and weight decay can be chosen one without another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ablab.optim.groups import norms_and_others


class DecoupledSGD(torch.optim.SGD):
    """SGD with Nesterov momentum; neither the momentum changes the size of a step nor the rate that of the decay.

    Under a constant gradient torch's SGD takes steps of lr / (1 − momentum). Here it gets the rate lr · (1 − momentum),
    and a weight decay by which weights lose the share `weight_decay` in a step at the full rate. Gains and shifts of
    norms can have a larger rate, at the same decay; all parameters decay.

    Args:
        params: groups as from `groups`.
        lr: the step under a constant gradient, which multiplies the gradient of the mean loss.
        momentum: of Nesterov's kind.
        weight_decay: the share that a step takes from the weights.
        norm_lr_scale: multiplies the rate of what norms learn.
        fused: one kernel for all weights, as torch's.

    Raises:
        ValueError: a value out of range.

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
        """The parameters of a model, those of norms apart."""
        norms, others = norms_and_others(model)
        return [{"params": others, "of_norms": False}, {"params": norms, "of_norms": True}]
