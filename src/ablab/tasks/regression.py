"""Regression: one or more target values per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, MetricCollection, R2Score

from ablab.data.batch import Batch
from ablab.tasks.task import Task, make_metrics

Objective = Literal["mse", "l1", "huber"]
LOSSES: dict[Objective, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}


class DefinedR2Score(R2Score):
    """R² that is NaN, instead of an error, for fewer than two samples."""

    def compute(self) -> Tensor:
        return super().compute() if int(self.total) > 1 else torch.tensor(torch.nan, device=self.device)


class Regression(Task):
    """Squared, absolute or Huber loss on standardized targets.

    Metrics: loss (on the standardized targets), mae and rmse (mean absolute and root mean squared error, in the unit of
    the target), r2 (1 is perfect, 0 is as good as the mean; not logged for a single sample). With several targets, each
    metric is the mean over targets, and mae and rmse are also logged per target, as `rmse/<target>`.

    Args:
        model, optimizer, scheduler, micro_batch_size, seed: see `Task`.
        target_names: names of the targets, in the order of the model's outputs.
        target_mean, target_std: mean and standard deviation of each target, used to standardize it.
        loss: "mse", "l1" or "huber" (squared up to one standard deviation, absolute beyond).

    Raises:
        ValueError: the loss is unknown.
    """

    monitorable: ClassVar = {"loss": "min", "mae": "min", "rmse": "min", "r2": "max"}

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        target_names: list[str],
        target_mean: list[float],
        target_std: list[float],
        loss: Objective = "mse",
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        if loss not in get_args(Objective):
            raise ValueError(f"loss={loss}: there are {', '.join(get_args(Objective))}")
        self.target_names = target_names
        self.target_mean = target_mean
        self.target_std = target_std
        self.objective: Objective = loss
        number = len(target_names)
        self.train_metrics = make_metrics({"rmse": MeanSquaredError(num_outputs=number)})
        for stage in ("val", "test"):
            metrics = {
                "loss": MeanMetric(),
                "mae": MeanAbsoluteError(num_outputs=number),
                # `scalars` takes the root, after averaging over the epoch
                "rmse": MeanSquaredError(num_outputs=number),
                "r2": DefinedR2Score(),
            }
            setattr(self, f"{stage}_metrics", make_metrics(metrics))

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return LOSSES[self.objective](logits, batch.targets.to(logits.dtype))

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        predictions = logits.float()
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(loss, weight=len(batch.targets))
            elif name == "r2" and predictions.shape[1] == 1:
                metric.update(predictions.flatten(), batch.targets.flatten())
            else:
                metric.update(predictions, batch.targets)

    def predictions(self, logits: Tensor) -> dict[str, list[Any]]:
        values = logits.double().cpu() * torch.tensor(self.target_std) + torch.tensor(self.target_mean)
        return dict(zip(self.target_names, values.T.tolist(), strict=True))

    def scalars(self, name: str, value: Tensor) -> list[tuple[str, Tensor]]:
        if name == "r2" and value.isnan():
            return []
        if name not in ("mae", "rmse"):
            return [(name, value)]
        scale = torch.tensor(self.target_std, device=value.device, dtype=value.dtype)
        errors = (value.sqrt() if name == "rmse" else value).view(-1) * scale
        each = zip(self.target_names, errors, strict=True) if len(errors) > 1 else ()
        return [(name, errors.mean()), *((f"{name}/{target}", error) for target, error in each)]
