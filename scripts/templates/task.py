"""A task of your own: focal loss over classes, as a starting point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from ablab.data.batch import Batch
from ablab.tasks.task import Task, make_metrics


class Template(Task):
    """Cross entropy weighted by (1 − p)^gamma, so that samples with high probability p of their class count less.

    To make it yours, change `loss` and the metrics. The data give `class_names`; data of numbers would give
    `target_names`, `target_mean` and `target_std`, of labels `label_names`, of text `characters_per_token`. Each
    argument behind these is a key of the YAML, conf/task/template.yaml.
    Everything else is an ordinary LightningModule: `training_step` and its other hooks may be overridden.

    Metrics: loss (nats, without the factor), accuracy (share of samples).

    Args:
        model, optimizer, scheduler, micro_batch_size, seed: see `Task`.
        class_names: the classes, in the order of their numbers.
        gamma: the exponent of the weight; 0 is plain cross entropy.

    Raises:
        ValueError: a negative gamma.

    References:
        Lin et al. 2017, https://arxiv.org/abs/1708.02002
    """

    # The metrics that may select the best checkpoint, and whether higher is better.
    monitorable: ClassVar = {"loss": "min", "accuracy": "max"}

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        class_names: list[str],
        gamma: float = 2.0,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        if gamma < 0:
            raise ValueError(f"gamma={gamma}: 0 (cross entropy) or more is needed")
        self.gamma = gamma
        number = len(class_names)
        self.train_metrics = make_metrics({"accuracy": MulticlassAccuracy(number, average="micro")})
        for stage in ("val", "test"):
            metrics = {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(number, average="micro")}
            setattr(self, f"{stage}_metrics", make_metrics(metrics))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean over samples, a scalar; validation and test omit the focal factor, so that runs compare."""
        each = F.cross_entropy(logits, batch.targets, reduction="none")
        wrong = (1 - (-each).exp()).clamp(min=1e-6)  # a power below 1 has no finite derivative at 0
        return (wrong**self.gamma * each if self.training else each).mean()

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        """Update the metrics with a batch; torchmetrics accumulates over all batches and processes."""
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(loss, weight=len(batch.targets))
            else:
                metric.update(logits, batch.targets)
