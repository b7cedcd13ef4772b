"""Multi-label classification: any number of labels per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

from ablab.data.batch import Batch
from ablab.tasks.task import Task, make_metrics

NUM_THRESHOLDS = 200  # for average precision; bounds its memory, which would otherwise grow with the predictions


class LabelPrecision(MultilabelAveragePrecision):
    """Per-label average precision, NaN for labels without positive samples."""

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics ignores it too
        counts: Any = self.metric_state  # (thresholds, labels, target, prediction)
        return super().compute().where(counts["confmat"][0, :, 1].sum(-1) > 0, torch.nan)


class MultiLabel(Task):
    """Binary cross entropy of each label.

    Metrics: loss (nats, mean over samples and labels), average_precision (macro average over labels of the area under
    the precision-recall curve, at 200 thresholds, without labels that have no positive samples), f1 (macro average over
    labels, at a threshold of 0.5).

    Args:
        model, optimizer, scheduler, micro_batch_size, seed: see `Task`.
        label_names: names of the labels, in the order of the model's outputs.
    """

    monitorable: ClassVar = {"loss": "min", "average_precision": "max", "f1": "max"}

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        label_names: list[str],
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        self.label_names = label_names
        number = len(label_names)
        # validate_args would synchronize with the GPU in every step; the data set has checked its labels
        self.train_metrics = make_metrics({"f1": MultilabelF1Score(number, validate_args=False)})
        for stage in ("val", "test"):
            precision = LabelPrecision(number, average="none", thresholds=NUM_THRESHOLDS, validate_args=False)
            metrics = {
                "loss": MeanMetric(),
                "average_precision": precision,
                "f1": MultilabelF1Score(number, validate_args=False),
            }
            setattr(self, f"{stage}_metrics", make_metrics(metrics))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype))

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(loss, weight=len(batch.targets))
            else:
                metric.update(logits.float().sigmoid(), batch.targets.long())

    def predictions(self, logits: Tensor) -> dict[str, list[Any]]:
        columns = logits.float().sigmoid().cpu().T.tolist()
        return {f"probability/{name}": column for name, column in zip(self.label_names, columns, strict=True)}

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        if name == "average_precision":
            value = value.nanmean()
        return [] if value.isnan() else [(name, value)]
