"""Semantic segmentation: one class for each pixel."""

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
from ablab.tasks.task import Task, at_least_float32, collection


class PixelAccuracy(Metric):
    """The share of counted pixels whose class is predicted; NaN where none is counted.

    torchmetrics picks the counted pixels with a mask, for which the CPU waits for a GPU in every step.
    """

    right: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("number", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        self.right += (predicted == targets).sum()  # no class has the number of ignored pixels
        self.number += (targets != IGNORED_PIXEL).sum()

    def compute(self) -> Tensor:
        return self.right / self.number


class PixelIoU(MulticlassConfusionMatrix):
    """The intersection over union of each class, NaN for a class that is neither in the masks nor predicted.

    Intersections and unions are of the pixels of all images together. torchmetrics counts pairs of classes in a matrix
    of pixels times squared classes where deterministic operations are asked for: 7 GB for an image of 512x512 and 21
    classes.
    """

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        number = self.num_classes
        pair = torch.where(targets == IGNORED_PIXEL, number * number, targets * number + predicted)
        self.confmat += pair.flatten().bincount(minlength=number * number + 1)[:-1].view(number, number)

    def compute(self) -> Tensor:
        both = self.confmat.diag()
        return both / (self.confmat.sum(0) + self.confmat.sum(1) - both)


class Segmentation(Task):
    """Cross entropy over the classes of each pixel; pixels of 255 in a mask do not count.

    Metrics: loss (nats, the mean over counted pixels), accuracy (share of counted pixels), mean_iou (the mean over
    classes of intersection over union, each of all counted pixels together; a class that is neither in a mask nor
    predicted is left out), and with `per_class` that of each class as `iou/<class>`.

    Args:
        model: from images to logits `(N, num_classes, H, W)`.
        optimizer, scheduler, micro_batch_size, seed: see `Task`.
        pixel_classes: the classes, in the order of their numbers.
        per_class: log each class's intersection over union in validation and test.

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
        self.train_metrics = collection({"accuracy": PixelAccuracy()})
        for stage in ("val", "test"):
            iou = PixelIoU(len(pixel_classes), validate_args=False)
            setattr(
                self, f"{stage}_metrics", collection({"loss": MeanMetric(), "accuracy": PixelAccuracy(), "iou": iou})
            )

    def num_targets(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORED_PIXEL).sum()

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        # Pixels as rows: torch has no deterministic loss of images on a GPU.
        rows, targets = at_least_float32(logits).movedim(1, -1).flatten(0, -2), batch.targets.flatten()
        total = F.cross_entropy(rows, targets, ignore_index=IGNORED_PIXEL, reduction="sum")
        return total / self.num_targets(batch).clamp(min=1)  # without a counted pixel 0, where torch's mean is NaN

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
