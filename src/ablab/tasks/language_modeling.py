"""Language modelling: next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection

from ablab.data.batch import Batch
from ablab.tasks.task import Task, make_metrics


class LanguageModeling(Task):
    """Cross entropy of the next token.

    Metrics: loss (nats per token), perplexity (exp of the loss), bits_per_character (loss in bits, divided by the mean
    number of characters per token).

    Args:
        model, optimizer, scheduler, micro_batch_size, seed: see `Task`.
        characters_per_token: mean number of characters per token of the text.
    """

    monitorable: ClassVar = {"loss": "min", "perplexity": "min", "bits_per_character": "min"}

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        characters_per_token: float = 1.0,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        self.characters_per_token = characters_per_token
        self.train_metrics = make_metrics({})
        self.val_metrics = make_metrics({"loss": MeanMetric()})
        self.test_metrics = make_metrics({"loss": MeanMetric()})

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def num_targets(self, batch: Batch) -> Tensor:
        return (batch.targets >= 0).sum()  # F.cross_entropy ignores targets of -100

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        for metric in metrics.values():
            metric.update(loss, weight=self.num_targets(batch))

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        return [
            ("loss", value),
            ("perplexity", value.exp()),
            ("bits_per_character", value / math.log(2) / self.characters_per_token),
        ]
