"""Parameters that are learned for a while, and then stay."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L


class Freeze(L.Callback):
    """From an epoch on, some parameters get no gradient and stay as they are, as if there were nothing to learn.

    Args:
        parameters: their names in the model.
        epoch: the first epoch without them, counted from 0.
    """

    def __init__(self, *, parameters: Sequence[str], epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: epochs are counted from 0")
        self.parameters = parameters
        self.epoch = epoch

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch < self.epoch:
            return
        for name in self.parameters:  # they stay among those that want one: several processes wait for each other's
            pl_module.model.get_parameter(name).grad = None  # type: ignore[union-attr]
