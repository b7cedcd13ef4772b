"""Lookahead: periodically reset the weights to a moving average of themselves."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor


class Lookahead(L.Callback):
    """Lookahead: every few steps, update an average of the weights and reset the weights to it.

    slow ← slow + (1 − d) · (weights − slow), weights ← slow, with d = decay^every_n_steps · (step / steps)^power. The
    average follows the weights closely at first and more slowly later. It includes the running averages of norms. At
    the end of each epoch, the weights are set to the average, which is validated, saved and tested.

    Args:
        every_n_steps: steps between two updates.
        start_epoch: first epoch with updates, counted from 0.
        decay: decay of the average per step.
        power: exponent of the completed fraction of the run.

    Raises:
        ValueError: a value is out of range.

    References:
        Zhang et al. 2019, https://arxiv.org/abs/1907.08610; Jordan 2024, https://arxiv.org/abs/2404.00498
    """

    def __init__(
        self, *, every_n_steps: int = 5, start_epoch: int = 3, decay: float = 0.95, power: float = 3.0
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: at least 1 is needed")
        if start_epoch < 0:
            raise ValueError(f"start_epoch={start_epoch}: epochs are counted from 0")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: a share is needed, at least 0 and below 1")
        if power < 0:
            raise ValueError(f"power={power}: at least 0 is needed")
        self.every_n_steps = every_n_steps
        self.start_epoch = start_epoch
        self.decay = decay
        self.power = power
        self.slow: list[Tensor] = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        step = trainer.global_step
        if trainer.current_epoch >= self.start_epoch and step % self.every_n_steps == 0:
            weights = averaged_tensors(pl_module)
            if not self.slow:
                self.slow = [weight.clone() for weight in weights]
            else:
                progress = step / float(trainer.estimated_stepping_batches)
                decay = self.decay**self.every_n_steps * progress**self.power
                torch._foreach_lerp_(self.slow, weights, 1 - decay)
                torch._foreach_copy_(weights, self.slow)
        if self.slow and (trainer.is_last_batch or step == trainer.max_steps):
            torch._foreach_copy_(averaged_tensors(pl_module), self.slow)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": [tensor.clone() for tensor in self.slow]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow = state_dict["slow"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.slow = [slow.to(weight) for slow, weight in zip(self.slow, averaged_tensors(pl_module), strict=False)]


def averaged_tensors(task: L.LightningModule) -> list[Tensor]:
    """Return the floating-point parameters and buffers of a model: weights and running averages."""
    model: Any = task.model
    return [tensor.data for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
