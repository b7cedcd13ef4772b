"""Classification: one class per sample."""

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
from ablab.tasks.task import Stage, Task, at_least_float32, make_metrics


class ClassAccuracy(MulticlassAccuracy):
    """Per-class accuracy, NaN for classes without samples."""

    def compute(self) -> Tensor:
        counts: Any = self.metric_state  # tensors, not lists
        return super().compute().where(counts["tp"] + counts["fn"] > 0, torch.nan)


def make_class_weights(
    weights: Literal["balanced"] | list[float] | None, counts: list[int] | None, num_classes: int
) -> Tensor | None:
    """Return class weights `(num_classes)`, or None for unweighted classes.

    Raises:
        ValueError: the weights do not match the classes, or "balanced" weights need counts that are unknown.
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

    Metrics: loss (nats), accuracy (fraction of samples), calibration_error (expected calibration error, 15 bins), and
    with `per_class` the accuracy of each class as `accuracy/<class>`. Classes without samples are not logged; a line
    names them once per stage.

    Args:
        model, optimizer, scheduler, micro_batch_size, seed: see `Task`.
        class_names: names of the classes, by class index.
        label_smoothing: fraction of the target distribution that is spread over all classes, in training only.
        class_weights: weight of each class in the training loss, the mean over samples of weight times (smoothed) cross
            entropy; "balanced" weights classes by their inverse number of training samples, with a mean weight of 1
            over these samples. None, and always validation and test, weights all classes equally.
        class_counts: number of training samples of each class, for "balanced".
        per_class: log the accuracy of each class in validation and test.
        test_time_augmentation: "mirror" averages the logits of an image and its mirror image in validation and test;
            "mirror_translate" averages them with those of the image and its mirror image shifted by one pixel, up-left
            and down-right.

    References:
        Guo et al. 2017 (calibration), https://arxiv.org/abs/1706.04599;
        Jordan 2024 (test-time augmentation), https://arxiv.org/abs/2404.00498
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
        self.reported: set[str] = set()  # stages in which classes without samples were reported
        self.label_smoothing = label_smoothing
        self.test_time_augmentation = test_time_augmentation
        num_classes = len(class_names)
        weights = make_class_weights(class_weights, class_counts, num_classes)
        # a setting, so not saved in checkpoints
        self.register_buffer("class_weights", weights, persistent=False)
        # validate_args would synchronize with the GPU in every step; the data set has checked its labels
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.train_metrics = make_metrics({"accuracy": accuracy})
        for stage in ("val", "test"):
            metrics = {
                "loss": MeanMetric(),
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            }
            if per_class:
                metrics["accuracy_per_class"] = ClassAccuracy(num_classes, average="none", validate_args=False)
            setattr(self, f"{stage}_metrics", make_metrics(metrics))

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        logits = self.average_views(batch)
        self.update(self.metrics(stage), logits, self.loss(logits, batch), batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.average_views(batch)

    def predictions(self, logits: Tensor) -> dict[str, list[Any]]:
        probabilities = logits.float().softmax(-1).cpu()
        likely = [self.class_names[number] for number in probabilities.argmax(-1).tolist()]
        each = zip(self.class_names, probabilities.T.tolist(), strict=True)
        return {"class": likely, **{f"probability/{name}": column for name, column in each}}

    def average_views(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, averaged over test-time augmentations."""
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
        # the smoothed cross entropy of every class
        each = -(1 - smoothing) * log_shares - smoothing * log_shares.mean(-1, keepdim=True)
        shares = F.one_hot(targets, each.shape[-1]) if batch.mixed is None else targets
        # not divided by the sum of weights, so that micro-batches add up
        return (shares * self.class_weights * each).sum(-1).mean()

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

    def compute_metrics(self, stage: Stage) -> dict[str, Tensor]:
        found = super().compute_metrics(stage)
        prefix = f"{stage}/accuracy/"
        empty = [
            name.removeprefix(prefix) for name, value in found.items() if name.startswith(prefix) and value.isnan()
        ]
        if empty and stage not in self.reported:
            self.reported.add(stage)
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            rank_zero_only(print)(f"{stage}: no samples of {names}; {stage}/accuracy of these classes is not logged")
        return {name: value for name, value in found.items() if name.removeprefix(prefix) not in empty}
