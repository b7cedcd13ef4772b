"""Batch norm's running averages taken anew, before the test: from training data, or from what is tested."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import lightning as L

from ablab.norms import recalibrate


class Recalibration(L.Callback):
    """Tests with precise batch statistics: of many batches with the final weights, not a moving average on the way.

    The checkpoint on disk keeps its averages. Norms without running averages are not touched.

    Args:
        num_batches: batches to take the statistics of.
        split: "train", or "test" to adapt to the inputs that are tested, shifted ones for example; no label is used.

    References:
        Wu & Johnson 2021, https://arxiv.org/abs/2105.07576
        Schneider et al. 2020 (the test's own statistics), https://arxiv.org/abs/2006.16971
    """

    def __init__(self, *, num_batches: int, split: Literal["train", "test"] = "train") -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches}: at least one is needed")
        self.num_batches = num_batches
        self.split = split

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with trainer.precision_plugin.forward_context():  # the precision that the run was trained in
            recalibrate(pl_module, self.batches(trainer, pl_module), pl_module)

    def batches(self, trainer: L.Trainer, task: L.LightningModule) -> Iterator[Any]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.train_dataloader() if self.split == "train" else data.test_dataloader()
        for batch in islice(loader, self.num_batches):
            yield data.on_after_batch_transfer(task.transfer_batch_to_device(batch, task.device, 0), 0)
