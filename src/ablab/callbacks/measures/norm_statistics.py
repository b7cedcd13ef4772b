"""What the norms of a network do: how many values they measure, what leaves them, and how train and eval differ."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ablab.callbacks.measures.measure import Measure, Trial, by_layer, exact, watched
from ablab.data.batch import Batch
from ablab.norms import NormLayer


class NormStatistics(Measure):
    """Values per statistic and the normalized activations of each norm layer, and the gap between train and eval.

    The normalized activations are the layer's output with gain 1 and shift 0 and without the nonlinearity behind it (a
    norm that brings its own keeps it). With m_c and s_c the mean and standard deviation of feature c over samples and
    positions, padding left out: the root of the mean m_c², the mean s_c, and the standard deviation of the s_c. If all
    features had one mean and one standard deviation, as after batch norm, these are 0, 1 and 0.

    The gap is that of the same inputs in the run's own mini-batches, dropout off: eval minus train loss, and
    ‖logits_eval − logits_train‖ / ‖logits_train‖, over all samples. It is 0 where the norm has no running averages.

    Logs `norms/values/<layer>` (values that a statistic is taken over in training, padding counted; 0 for none),
    `norms/mean/<layer>`, `norms/std/<layer>`, `norms/std_spread/<layer>`, the means over layers as `norms/values`, …,
    and `norms/train_loss`, `norms/eval_loss`, `norms/loss_gap`, `norms/logits_gap`. Without norm layers there are the
    last four.

    Args:
        every_n_steps, num_samples: see `Measure`.

    References:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167
    """

    def __init__(self, *, every_n_steps: int = 50, num_samples: int = 256) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)

    def measure(self, trial: Trial, batches: list[Batch], lr: float) -> Mapping[str, float]:
        norms = {name: Watched(m) for name, m in trial.model.named_modules() if isinstance(m, NormLayer)}
        handles = watched(
            {name: norm.layer for name, norm in norms.items()}, lambda name, _, *given: norms[name](*given)
        )
        try:
            values = gap(trial, batches)
        finally:
            for handle in handles:
                handle.remove()
        seen = {name: norm for name, norm in norms.items() if norm.count}
        return {
            **by_layer("norms/values", {name: float(norm.num_values) for name, norm in seen.items()}),
            **by_layer("norms/mean", {name: float(norm.mean.square().mean().sqrt()) for name, norm in seen.items()}),
            **by_layer("norms/std", {name: float(norm.std.mean()) for name, norm in seen.items()}),
            **by_layer("norms/std_spread", {name: float(norm.std.std(correction=0)) for name, norm in seen.items()}),
            **values,
        }


@torch.no_grad()
def gap(trial: Trial, batches: list[Batch]) -> dict[str, float]:
    """Loss and logits of the same batches with the model in train and in eval mode; the loss is evaluation's."""
    losses, logits = {}, {}
    for mode in ("train", "eval"):
        trial.train()
        trial.task.training = False  # nothing but the model differs
        if mode == "eval":
            trial.model.eval()
        outputs = [trial(batch) for batch in batches]
        shares = trial.shares(batches)
        losses[mode] = sum(
            float(trial.task.loss(output, batch)) * share
            for output, (batch, share) in zip(outputs, shares, strict=True)
        )
        logits[mode] = torch.cat([exact(output).flatten() for output in outputs])
    trial.train()
    difference, length = (logits["eval"] - logits["train"]).norm(), logits["train"].norm()
    return {
        "norms/train_loss": losses["train"],
        "norms/eval_loss": losses["eval"],
        "norms/loss_gap": losses["eval"] - losses["train"],
        "norms/logits_gap": float(difference / length) if length else 0.0,
    }


class Watched:
    """Moments of what a norm layer makes of its inputs in train mode, before gain and shift.

    Args:
        layer: stays as it is.
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
        for own, buffer in zip(self.bare.buffers(), self.layer.buffers(), strict=True):
            own.copy_(buffer)  # running averages as they are
        y = self.bare(*arguments, **keywords).movedim(self.layer.feature_dim, -1)
        rows = exact(y.reshape(-1, y.shape[-1]) if valid is None else y[valid])
        self.count += len(rows)
        self.sum = self.sum.to(rows.device) + rows.sum(0)
        self.squares = self.squares.to(rows.device) + rows.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count - self.mean.square()).clamp(min=0).sqrt()
