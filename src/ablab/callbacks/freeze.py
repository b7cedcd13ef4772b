"""Freeze parameters after some epochs."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L


class Freeze(L.Callback):
    """Freeze parameters from an epoch on, by removing their gradients.

    Args:
        parameters: names of the parameters in the model.
        epoch: first epoch in which they are frozen, counted from 0.
    """

    def __init__(self, *, parameters: Sequence[str], epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs are counted from 0")
        self.parameters = parameters
        self.epoch = epoch

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch < self.epoch:
            return
        for name in self.parameters:  # requires_grad stays True: DDP would wait for their gradients
            pl_module.model.get_parameter(name).grad = None  # type: ignore[union-attr]
