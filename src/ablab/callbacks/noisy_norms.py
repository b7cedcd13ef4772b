"""Add random distribution shift to norm outputs, the control experiment of Santurkar et al. 2018."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ablab.norms import NormLayer


class NoisyNorms(L.Callback):
    """Shift and scale the output of every norm layer in training, with a new random distribution in each step.

    If batch norm works by keeping the distribution of a layer's inputs stable, this should undo its benefit. The value
    y of a feature becomes s·y + m, with m ~ U(μ − 0.1, μ + 0.1) and s ~ N(σ, 0.1) per sample, and
    μ ~ U(−shift, shift), σ ~ U(1, scale) per feature and step.

    The noise depends on the run's seed and the step only, like dropout, so that a resumed run draws the same.

    Args:
        shift: maximum absolute mean shift of a feature.
        scale: maximum mean gain of a feature.

    Raises:
        ValueError: `shift` is below 0, or `scale` below 1.

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
                module.register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        features = output.shape[1] if output.dim() == 4 else output.shape[-1]
        shape = [len(output), *([1] * (output.dim() - 1))]
        shape[1 if output.dim() == 4 else -1] = features
        like = {"dtype": output.dtype, "device": output.device}
        mean_shift = (2 * torch.rand(features, **like) - 1) * self.shift  # type: ignore[call-overload]
        mean_gain = 1 + torch.rand(features, **like) * (self.scale - 1)  # type: ignore[call-overload]
        shift = mean_shift + 0.2 * torch.rand(len(output), features, **like) - 0.1  # type: ignore[call-overload]
        scale = mean_gain + 0.1 * torch.randn(len(output), features, **like)  # type: ignore[call-overload]
        return output * scale.view(shape) + shift.view(shape)
