"""Statistics of norm layers: values per statistic, normalized activations, and the gap between train and eval."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ablab.callbacks.diagnostics.diagnostic import Diagnostic, TaskCopy, add_input_hooks, layer_means, to_float64
from ablab.data.batch import Batch
from ablab.norms import NormLayer


class NormStatistics(Diagnostic):
    """Values per statistic and normalized activations of each norm layer, and the gap between train and eval mode.

    Normalized activations are the layer's output with gain 1 and shift 0, without the nonlinearity after it (norms with
    their own nonlinearity keep it). With m_c and s_c the mean and standard deviation of feature c over samples and
    positions, without padding, measures the root mean square of m_c, the mean of s_c, and the standard deviation of
    s_c. Right after batch norm, these are 0, 1 and 0.

    The gap compares both modes on the same inputs in mini-batches of the run's size, with dropout off: eval loss minus
    train loss, and ‖logits_eval − logits_train‖ / ‖logits_train‖ over all samples. It is 0 without running averages.

    Logs `norms/values/<layer>` (number of values per statistic in training, including padding; 0 for none),
    `norms/mean/<layer>`, `norms/std/<layer>`, `norms/std_spread/<layer>`, the means over layers as `norms/values`, …,
    and `norms/train_loss`, `norms/eval_loss`, `norms/loss_gap`, `norms/logits_gap`. Without norm layers, logs the last
    four only.

    Args:
        every_n_steps, num_samples: see `Diagnostic`.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    def __init__(self, *, every_n_steps: int = 50, num_samples: int = 256) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)

    def measure(self, task_copy: TaskCopy, batches: list[Batch], lr: float) -> Mapping[str, float]:
        norms = {name: OutputMoments(m) for name, m in task_copy.model.named_modules() if isinstance(m, NormLayer)}
        handles = add_input_hooks(
            {name: norm.layer for name, norm in norms.items()}, lambda name, _, *given: norms[name](*given)
        )
        try:
            values = train_eval_gap(task_copy, batches)
        finally:
            for handle in handles:
                handle.remove()
        seen = {name: norm for name, norm in norms.items() if norm.count}
        return {
            **layer_means("norms/values", {name: float(norm.num_values) for name, norm in seen.items()}),
            **layer_means("norms/mean", {name: float(norm.mean.square().mean().sqrt()) for name, norm in seen.items()}),
            **layer_means("norms/std", {name: float(norm.std.mean()) for name, norm in seen.items()}),
            **layer_means("norms/std_spread", {name: float(norm.std.std(correction=0)) for name, norm in seen.items()}),
            **values,
        }


@torch.no_grad()
def train_eval_gap(task_copy: TaskCopy, batches: list[Batch]) -> dict[str, float]:
    """Return the gap in loss and logits between the model in train and eval mode, with the evaluation loss."""
    losses, logits = {}, {}
    for mode in ("train", "eval"):
        task_copy.train()
        task_copy.task.training = False  # use the evaluation loss in both modes
        if mode == "eval":
            task_copy.model.eval()
        outputs = [task_copy(batch) for batch in batches]
        shares = task_copy.with_weights(batches)
        losses[mode] = sum(
            float(task_copy.task.loss(output, batch)) * share
            for output, (batch, share) in zip(outputs, shares, strict=True)
        )
        logits[mode] = torch.cat([to_float64(output).flatten() for output in outputs])
    task_copy.train()
    difference, length = (logits["eval"] - logits["train"]).norm(), logits["train"].norm()
    return {
        "norms/train_loss": losses["train"],
        "norms/eval_loss": losses["eval"],
        "norms/loss_gap": losses["eval"] - losses["train"],
        "norms/logits_gap": float(difference / length) if length else 0.0,
    }


class OutputMoments:
    """Accumulator of the moments of a norm layer's normalized activations in train mode, before gain and shift.

    Args:
        layer: the norm layer; not modified.
    """

    def __init__(self, layer: NormLayer) -> None:
        self.layer = layer
        self.bare = deepcopy(layer)
        self.bare.activation = None
        for parameter, neutral in ((self.bare.weight, 1.0), (self.bare.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, neutral)
        self.num_values = 0
        self.count = 0
        self.sum = self.squares = torch.zeros(())

    @torch.no_grad()
    def __call__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not self.layer.training:
            return
        x = arguments[0]
        valid: Tensor | None = keywords.get("valid", arguments[1] if len(arguments) > 1 else None)
        self.num_values = min((self.layer.values(s, x.shape) for s in self.layer.statistics), default=0)
        for copy, buffer in zip(self.bare.buffers(), self.layer.buffers(), strict=True):
            copy.copy_(buffer)  # start from the layer's running averages
        y = self.bare(*arguments, **keywords).movedim(self.layer.feature_dim, -1)
        rows = to_float64(y.reshape(-1, y.shape[-1]) if valid is None else y[valid])
        self.count += len(rows)
        self.sum = self.sum.to(rows.device) + rows.sum(0)
        self.squares = self.squares.to(rows.device) + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()
