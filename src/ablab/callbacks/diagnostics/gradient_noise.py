"""Gradient noise: variance of mini-batch gradients and the simple noise scale."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import nn

from ablab.callbacks.diagnostics.diagnostic import (
    Diagnostic,
    TaskCopy,
    check_at_least,
    equal_sized,
    normalization_batch_size,
    to_float64,
)
from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule


class GradientNoise(Diagnostic):
    """The variance of a mini-batch's gradient, and the simple noise scale tr(Σ) / |G|².

    Unbiased estimates from the gradients g_j of n disjoint groups of b samples, with mean ḡ:
    tr(Σ) = b · Σ_j |g_j − ḡ|² / (n − 1), the variance of per-sample gradients, summed over all weights;
    |G|² = |ḡ|² − tr(Σ) / (n b), the squared length of the true gradient. A mini-batch of B independent samples has the
    variance tr(Σ) / B. These equal the paper's estimates from |g|² at the batch sizes b and n b.

    With norms that depend on the batch, a group is a forward pass of the run's size. A sample's gradient then depends
    on the others, so per-sample gradients are not defined, and tr(Σ) is b times the variance over forward passes.

    Logs `gradient/variance` (tr(Σ)), `gradient/batch_variance` (of a mini-batch of the run), `gradient/squared_norm`
    (|G|²), and `gradient/noise_scale` if the estimate of |G|² is above 0. The ratio of two estimates is biased: to
    smooth it over time, average numerator and denominator before dividing.

    Args:
        num_groups: number of groups, at least 2; not used if a norm depends on the batch.
        every_n_steps, num_samples: see `Diagnostic`.

    References:
        McCandlish et al. 2018, section 2.2 and appendix A.1, https://arxiv.org/abs/1812.06162
    """

    def __init__(self, *, every_n_steps: int = 100, num_samples: int = 256, num_groups: int = 16) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)
        check_at_least(2, num_groups=num_groups)
        if num_samples < num_groups:
            raise ValueError(f"num_groups={num_groups}: there are {num_samples} samples for them; choose fewer groups")
        self.num_groups = num_groups
        self.batch_size = 0  # of an optimizer step, set in `setup`

    def size(self, data: DataModule, model: nn.Module, world_size: int) -> int:
        return normalization_batch_size(data, model, world_size) or self.num_samples // self.num_groups

    def check(self, data: DataModule, model: nn.Module, world_size: int) -> None:
        super().check(data, model, world_size)
        size = self.size(data, model, world_size)
        if self.num_samples < 2 * size:
            raise ValueError(
                f"num_samples={self.num_samples}: the model's norm sees {size} samples together, and a variance needs "
                f"two such batches; choose at least {2 * size}, or leave GradientNoise out"
            )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]

    def measure(self, task_copy: TaskCopy, batches: list[Batch], lr: float) -> Mapping[str, float]:
        variance, squared_norm = estimate_noise(task_copy, equal_sized(batches))
        values = {
            "gradient/variance": variance,
            "gradient/batch_variance": variance / self.batch_size,
            "gradient/squared_norm": squared_norm,
        }
        return {**values, "gradient/noise_scale": variance / squared_norm} if squared_norm > 0 else values


def estimate_noise(task_copy: TaskCopy, groups: list[Batch]) -> tuple[float, float]:
    """Return unbiased estimates of tr(Σ), for single samples, and of |G|², from groups of equal size."""
    count, size = len(groups), len(groups[0].targets)
    mean, squares = torch.zeros(()), 0.0  # running moments (Welford), to avoid storing all gradients
    for number, group in enumerate(groups, 1):
        _, gradient = task_copy.gradient([group])
        delta = gradient - mean.to(gradient.device)
        mean = mean.to(gradient.device) + delta / number
        squares += float(torch.dot(to_float64(delta), to_float64(gradient - mean)))
    variance = size * squares / (count - 1)
    return variance, float(to_float64(mean).square().sum()) - variance / (count * size)
