"""Recompute batch norm's running averages before the test, on training or test data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import lightning as L

from ablab.norms import recalibrate


class Recalibration(L.Callback):
    """Test with precise batch norm: statistics of many batches under the final weights, not a moving average.

    Checkpoints are not changed. Norms without running averages are unaffected.

    Args:
        num_batches: number of batches to compute the statistics on.
        split: "train", or "test" to adapt to the (for example shifted) test inputs; labels are not used.

    References:
        Wu & Johnson 2021, https://arxiv.org/abs/2105.07576
        Schneider et al. 2020 (statistics of the test set), https://arxiv.org/abs/2006.16971
    """

    def __init__(self, *, num_batches: int, split: Literal["train", "test"] = "train") -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches}: at least one is needed")
        self.num_batches = num_batches
        self.split = split

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with trainer.precision_plugin.forward_context():  # the precision of training
            recalibrate(pl_module, self.batches(trainer, pl_module), pl_module)

    def batches(self, trainer: L.Trainer, task: L.LightningModule) -> Iterator[Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.train_dataloader() if self.split == "train" else data.test_dataloader()
        for batch in islice(loader, self.num_batches):
            yield data.on_after_batch_transfer(task.transfer_batch_to_device(batch, task.device, 0), 0)
