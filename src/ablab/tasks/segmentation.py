"""Semantic segmentation: one class per pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from ablab.data.batch import IGNORED_PIXEL, Batch
from ablab.tasks.task import Task, at_least_float32, make_metrics


class PixelAccuracy(Metric):
    """Pixel accuracy, without ignored pixels; NaN if all pixels are ignored.

    torchmetrics selects pixels with a boolean mask, which synchronizes with the GPU in every step.
    """

    right: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("number", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        self.right += (predicted == targets).sum()  # no class has the index IGNORED_PIXEL
        self.number += (targets != IGNORED_PIXEL).sum()

    def compute(self) -> Tensor:
        return self.right / self.number


class PixelIoU(MulticlassConfusionMatrix):
    """Per-class intersection over union, NaN for classes that are neither in the masks nor predicted.

    Intersections and unions are summed over all images. With deterministic algorithms, torchmetrics builds a matrix of
    pixels x classes² to count pairs of classes, 7 GB for a 512x512 image and 21 classes; this class uses bincount.
    """

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        number = self.num_classes
        pair = torch.where(targets == IGNORED_PIXEL, number * number, targets * number + predicted)
        self.confmat += pair.flatten().bincount(minlength=number * number + 1)[:-1].view(number, number)

    def compute(self) -> Tensor:
        both = self.confmat.diag()
        return both / (self.confmat.sum(0) + self.confmat.sum(1) - both)


class Segmentation(Task):
    """Pixelwise cross entropy; pixels with the value 255 in a mask are ignored.

    Metrics: loss (nats, mean over pixels), accuracy (fraction of pixels), mean_iou (mean over classes of intersection
    over union on all pixels; classes that are neither in the masks nor predicted are left out), and with `per_class`
    the IoU of each class as `iou/<class>`. Ignored pixels do not count.

    Args:
        model: maps images to logits `(N, num_classes, H, W)`.
        optimizer, scheduler, micro_batch_size, seed: see `Task`.
        pixel_classes: names of the classes, by class index.
        per_class: log the IoU of each class in validation and test.

    References:
        Long et al. 2015 (the metrics), https://arxiv.org/abs/1411.4038
    """

    takes: ClassVar = ("masks",)
    monitorable: ClassVar = {"loss": "min", "accuracy": "max", "mean_iou": "max"}

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        pixel_classes: list[str],
        per_class: bool = False,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        self.pixel_classes = pixel_classes
        self.per_class = per_class
        self.train_metrics = make_metrics({"accuracy": PixelAccuracy()})
        for stage in ("val", "test"):
            iou = PixelIoU(len(pixel_classes), validate_args=False)
            setattr(
                self, f"{stage}_metrics", make_metrics({"loss": MeanMetric(), "accuracy": PixelAccuracy(), "iou": iou})
            )

    def num_targets(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORED_PIXEL).sum()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        # Pixels as rows: torch has no deterministic 2D cross entropy on GPUs.
        rows, targets = at_least_float32(logits).movedim(1, -1).flatten(0, -2), batch.targets.flatten()
        total = F.cross_entropy(rows, targets, ignore_index=IGNORED_PIXEL, reduction="sum")
        # 0 if all pixels are ignored, where reduction="mean" is NaN
        return total / self.num_targets(batch).clamp(min=1)

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        predicted = logits.argmax(1)
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(loss, weight=self.num_targets(batch))
            else:
                metric.update(predicted, batch.targets)

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        found = [(name, value)]
        if name == "iou":
            each = zip(self.pixel_classes, value, strict=True) if self.per_class else ()
            found = [("mean_iou", value.nanmean()), *((f"iou/{label}", iou) for label, iou in each)]
        return [(label, scalar) for label, scalar in found if not scalar.isnan()]
