"""Norms whose outputs are made to shift again: the control of Santurkar et al. 2018."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ablab.norms import NormLayer


class NoisyNorms(L.Callback):
    """Shifts and scales what every norm layer gives, in training, by noise whose distribution is another in each step.

    If batch norm helped by keeping the distribution of a layer's inputs where it was, this would undo it. With s·y + m
    for the value y of a feature, m ~ U(μ − 0.1, μ + 0.1) and s ~ N(σ, 0.1) for each sample, where for each feature and
    step μ ~ U(−shift, shift) and σ ~ U(1, scale).

    What is drawn follows from the run's seed and the step, as dropout does: a resumed run draws the same.

    Args:
        shift: how far the mean of a feature's noise may be from 0.
        scale: up to which its gain may go.

    Raises:
        ValueError: a shift below 0, a scale below 1.

    References:
        Santurkar et al. 2018, section 2.1 and appendix A, https://arxiv.org/abs/1805.11604
    """

    def __init__(self, *, shift: float = 0.5, scale: float = 1.25) -> None:
        if shift < 0:
            raise ValueError(f"shift={shift}: at least 0 is needed")
        if scale < 1:
            raise ValueError(f"scale={scale}: at least 1 is needed")
        self.shift = shift
        self.scale = scale

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, NormLayer):
                module.register_forward_hook(self.disturb)

    def disturb(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        features = output.shape[1] if output.dim() == 4 else output.shape[-1]
        shape = [len(output), *([1] * (output.dim() - 1))]
        shape[1 if output.dim() == 4 else -1] = features
        like = {"dtype": output.dtype, "device": output.device}
        centre = (2 * torch.rand(features, **like) - 1) * self.shift  # type: ignore[call-overload]
        gain = 1 + torch.rand(features, **like) * (self.scale - 1)  # type: ignore[call-overload]
        moved = centre + 0.2 * torch.rand(len(output), features, **like) - 0.1  # type: ignore[call-overload]
        scaled = gain + 0.1 * torch.randn(len(output), features, **like)  # type: ignore[call-overload]
        return output * scaled.view(shape) + moved.view(shape)
