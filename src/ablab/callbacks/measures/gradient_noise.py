"""How noisy the gradient of a mini-batch is."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch
from torch import nn

from ablab.callbacks.measures.measure import Measure, Trial, at_least, exact, full, seen_together
from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule


class GradientNoise(Measure):
    """The variance of a mini-batch's gradient, and the simple noise scale tr(Σ) / |G|².

    From the gradients g_j of n disjoint groups of b samples, with ḡ their mean, all without bias:
    tr(Σ) = b · Σ_j |g_j − ḡ|² / (n − 1), the variance of single samples' gradients, summed over all weights;
    |G|² = |ḡ|² − tr(Σ) / (n b), the squared length of the true gradient. A mini-batch of B samples that are drawn
    independently has the variance tr(Σ) / B. The same numbers follow from the paper's |g|² at the two sizes b and n b.

    With norms that see the batch, a group is a forward pass of the run's own size: the gradient of a sample then
    depends on the others, single samples have none of their own, and tr(Σ) is b times the variance of a forward pass.

    Logs `gradient/variance` (tr(Σ)), `gradient/batch_variance` (of a mini-batch of the run), `gradient/squared_norm`
    (|G|²), and `gradient/noise_scale` where the estimate of |G|² is above 0. The ratio of two estimates is biased: to
    smooth it, average the two first, then divide.

    Args:
        num_groups: into which the samples are split, unless the norm sees the batch; 2 or more.
        every_n_steps, num_samples: see `Measure`.

    References:
        McCandlish et al. 2018, section 2.2 and appendix A.1, https://arxiv.org/abs/1812.06162
    """

    def __init__(self, *, every_n_steps: int = 100, num_samples: int = 256, num_groups: int = 16) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)
        at_least(2, num_groups=num_groups)
        if num_samples < num_groups:
            raise ValueError(f"num_groups={num_groups}: there are {num_samples} samples for them; choose fewer groups")
        self.num_groups = num_groups
        self.batch_size = 0  # of the optimizer

    def size(self, data: DataModule, model: nn.Module, world_size: int) -> int:
        return seen_together(data, model, world_size) or self.num_samples // self.num_groups

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

    def measure(self, trial: Trial, batches: list[Batch], lr: float) -> Mapping[str, float]:
        variance, squared_norm = noise(trial, full(batches))
        values = {
            "gradient/variance": variance,
            "gradient/batch_variance": variance / self.batch_size,
            "gradient/squared_norm": squared_norm,
        }
        return {**values, "gradient/noise_scale": variance / squared_norm} if squared_norm > 0 else values


def noise(trial: Trial, groups: list[Batch]) -> tuple[float, float]:
    """Unbiased estimates of tr(Σ), for single samples, and of |G|², from groups of equal size."""
    count, size = len(groups), len(groups[0].targets)
    mean, squares = torch.zeros(()), 0.0  # of all so far (Welford): their gradients need not be kept
    for number, group in enumerate(groups, 1):
        _, gradient = trial.gradient([group])
        away = gradient - mean.to(gradient.device)
        mean = mean.to(gradient.device) + away / number
        squares += float(torch.dot(exact(away), exact(gradient - mean)))
    variance = size * squares / (count - 1)
    return variance, float(exact(mean).square().sum()) - variance / (count * size)
