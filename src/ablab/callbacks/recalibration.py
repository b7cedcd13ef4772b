"""Batch norm's running averages taken anew from training data, before the test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning as L

from ablab.norms import recalibrate


class Recalibration(L.Callback):
    """Tests with precise batch statistics: of many batches with the final weights, not a moving average on the way.

    The checkpoint on disk keeps its averages. Norms without running averages are not touched.

    Args:
        num_batches: training batches to take the statistics of.

    References:
        Wu & Johnson 2021, https://arxiv.org/abs/2105.07576
    """

    def __init__(self, *, num_batches: int) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches}: at least one is needed")
        self.num_batches = num_batches

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with trainer.precision_plugin.forward_context():  # the precision that the run was trained in
            recalibrate(pl_module, self.batches(trainer, pl_module), pl_module)

    def batches(self, trainer: L.Trainer, task: L.LightningModule) -> Iterator[Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for batch in islice(data.train_dataloader(), self.num_batches):
            yield data.on_after_batch_transfer(task.transfer_batch_to_device(batch, task.device, 0), 0)
