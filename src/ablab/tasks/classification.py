"""Classification: one label for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from ablab.data.batch import Batch
from ablab.tasks.task import Stage, Task, at_least_float32, collection


class ClassAccuracy(MulticlassAccuracy):
    """The accuracy of each class, NaN for a class of which there was no sample."""

    def compute(self) -> Tensor:
        counts: Any = self.metric_state  # tensors, since nothing is gathered into lists
        return super().compute().where(counts["tp"] + counts["fn"] > 0, torch.nan)


def class_weights_of(
    weights: Literal["balanced"] | list[float] | None, counts: list[int] | None, num_classes: int
) -> Tensor | None:
    """Return the weight of each class `(num_classes)`; None weighs all alike.

    Raises:
        ValueError: they do not fit the classes, or cannot be counted.
    """
    if weights is None:
        return None
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f"class_weights={weights}: balanced, a list of one number a class, or null is needed")
        if counts is None:
            raise ValueError(
                "class_weights=balanced: the classes of these training samples are not counted, since they are read "
                f"as a stream; give a list of {num_classes} numbers"
            )
        return sum(counts) / (num_classes * torch.tensor(counts, dtype=torch.float32))
    numbers = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights)
    if not numbers or len(weights) != num_classes or not any(weights):
        raise ValueError(
            f"class_weights={weights}: {num_classes} numbers are needed, one a class, none negative, not all 0"
        )
    return torch.tensor(weights, dtype=torch.float32)


class Classification(Task):
    """Cross entropy over classes.

    Metrics: loss (nats), accuracy (share of samples), calibration_error (expected, 15 bins), and with `per_class` the
    accuracy of each class as `accuracy/<class>`; that of a class without samples is not logged, and it is said once.

    Args:
        model, optimizer, scheduler, micro_batch_size, seed: see `Task`.
        class_names: the classes, in the order of their numbers.
        label_smoothing: the share of the target that is spread over all classes, in training only.
        class_weights: what a sample of each class counts in the training loss, which is the mean over samples of their
            weight times their cross entropy, smoothed or not; "balanced" weighs each class by the inverse of its number
            of training samples, with a mean weight of 1 over these samples. None weighs all alike, as validation and
            test always do.
        class_counts: the training samples of each class, for "balanced".
        per_class: log each class's accuracy in validation and test.
        test_time_augmentation: "mirror" averages the logits of an image and of its mirror image in validation and test;
            "mirror_translate" takes half of its weight from the same two of the image moved by a pixel, up and to the
            left or down and to the right.

    References:
        Guo et al. 2017 (calibration), https://arxiv.org/abs/1706.04599;
        Jordan 2024 (these views), https://arxiv.org/abs/2404.00498
    """

    monitorable: ClassVar = {"loss": "min", "accuracy": "max", "calibration_error": "min"}
    class_weights: Tensor | None

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        class_names: list[str],
        label_smoothing: float = 0.0,
        class_weights: Literal["balanced"] | list[float] | None = None,
        class_counts: list[int] | None = None,
        per_class: bool = False,
        test_time_augmentation: Literal["none", "mirror", "mirror_translate"] = "none",
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: a share of the target is needed, at least 0, below 1")
        self.class_names = class_names
        self.said: set[str] = set()  # the stages whose classes without samples have been named
        self.label_smoothing = label_smoothing
        self.test_time_augmentation = test_time_augmentation
        num_classes = len(class_names)
        weights = class_weights_of(class_weights, class_counts, num_classes)
        self.register_buffer("class_weights", weights, persistent=False)  # a setting, so in no checkpoint
        # the data have checked their labels; doing so in each step would wait for the device
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.train_metrics = collection({"accuracy": accuracy})
        for stage in ("val", "test"):
            metrics = {
                "loss": MeanMetric(),
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            }
            if per_class:
                metrics["accuracy_per_class"] = ClassAccuracy(num_classes, average="none", validate_args=False)
            setattr(self, f"{stage}_metrics", collection(metrics))

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        logits = self.over_views(batch)
        self.update(self.metrics(stage), logits, self.loss(logits, batch), batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.over_views(batch)

    def predictions(self, logits: Tensor) -> dict[str, list[Any]]:
        probabilities = logits.float().softmax(-1).cpu()
        likely = [self.class_names[number] for number in probabilities.argmax(-1).tolist()]
        each = zip(self.class_names, probabilities.T.tolist(), strict=True)
        return {"class": likely, **{f"probability/{name}": column for name, column in each}}

    def over_views(self, batch: Batch) -> Tensor:
        """The logits of a batch, or their mean over the views of each image."""
        if self.test_time_augmentation == "none":
            return self(batch)

        def mirrored(images: Tensor) -> Tensor:
            return (self(batch._replace(inputs=images)) + self(batch._replace(inputs=images.flip(-1)))) / 2

        logits = mirrored(batch.inputs)
        if self.test_time_augmentation == "mirror_translate":
            height, width = batch.inputs.shape[2:]
            padded = F.pad(batch.inputs, (1, 1, 1, 1), "reflect")
            moved = mirrored(padded[:, :, :height, :width]) + mirrored(padded[:, :, 2:, 2:])
            logits = (logits + moved / 2) / 2
        return logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = batch.targets if batch.mixed is None else batch.mixed
        if not self.training:
            return F.cross_entropy(logits, targets)
        if self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        log_shares = at_least_float32(logits).log_softmax(-1)
        smoothing = self.label_smoothing
        each = -(1 - smoothing) * log_shares - smoothing * log_shares.mean(-1, keepdim=True)  # were it of each class
        shares = F.one_hot(targets, each.shape[-1]) if batch.mixed is None else targets
        return (shares * self.class_weights * each).sum(-1).mean()  # not over the weights' sum: parts have to add up

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(loss, weight=len(batch.targets))
            elif name == "calibration_error":
                metric.update(logits.float().softmax(-1), batch.targets)
            else:
                metric.update(logits, batch.targets)

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        if name != "accuracy_per_class":
            return [(name, value)]
        return [(f"accuracy/{label}", value[i]) for i, label in enumerate(self.class_names)]

    def counted(self, stage: Stage) -> dict[str, Tensor]:
        found = super().counted(stage)
        prefix = f"{stage}/accuracy/"
        empty = [
            name.removeprefix(prefix) for name, value in found.items() if name.startswith(prefix) and value.isnan()
        ]
        if empty and stage not in self.said:
            self.said.add(stage)
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            rank_zero_only(print)(f"{stage}: no samples of {names}; {stage}/accuracy of these classes is not logged")
        return {name: value for name, value in found.items() if name.removeprefix(prefix) not in empty}
