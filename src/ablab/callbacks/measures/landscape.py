"""How smooth the loss is along its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ablab.callbacks.measures.measure import Measure, Trial, exact
from ablab.data.batch import Batch


class Landscape(Measure):
    """Loss and gradient along the line x − s ∇L(x), for some step sizes s.

    Range of the loss, of the gradient's change ‖∇L(x) − ∇L(x − s ∇L(x))‖, and the effective smoothness
    β = max_s ‖∇L(x) − ∇L(x − s ∇L(x))‖ / ‖s ∇L(x)‖, the largest change of the gradient over the distance moved.
    L is the mean over fixed samples, in the run's own mini-batches where the norm sees them; the paper has the batch
    of the step. The direction is the gradient's whatever the optimizer.

    Logs `landscape/loss_min`, `landscape/loss_max`, `landscape/loss_range` (over all s, and s = 0),
    `landscape/gradient_change_min`, `landscape/gradient_change_max`, `landscape/gradient_change_range` (over all s) and
    `landscape/smoothness` (β). Nothing is logged where no step can be taken: the learning rate or the gradient is 0.

    Args:
        multiples: step sizes as multiples of the current learning rate; None with `step_sizes`.
        step_sizes: the step sizes themselves, instead.
        every_n_steps, num_samples: see `Measure`.

    Raises:
        ValueError: step sizes that are not above 0, both lists, or neither.

    References:
        Santurkar et al. 2018, section 3.1 and figure 4, https://arxiv.org/abs/1805.11604
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        num_samples: int = 256,
        multiples: list[float] | None = None,
        step_sizes: list[float] | None = None,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)
        if (multiples is None) == (step_sizes is None):
            raise ValueError(
                f"multiples={multiples}, step_sizes={step_sizes}: one of the two says how far to go; set the other "
                "to null"
            )
        for name, sizes in (("multiples", multiples), ("step_sizes", step_sizes)):
            if sizes is not None and (not sizes or not all(0 < size < math.inf for size in sizes)):
                raise ValueError(
                    f"{name}={sizes}: steps have sizes above 0; give at least one, for example [0.5, 1, 2]"
                )
        self.multiples = multiples
        self.step_sizes = step_sizes

    def measure(self, trial: Trial, batches: list[Batch], lr: float) -> Mapping[str, float]:
        sizes = self.step_sizes or [multiple * lr for multiple in self.multiples or []]
        return along_gradient(trial, batches, sizes)


def along_gradient(trial: Trial, batches: list[Batch], sizes: list[float]) -> dict[str, float]:
    """What is logged, for step sizes from the trial's weights; the trial's weights end somewhere along the line."""
    loss, gradient = trial.gradient(batches)
    length = float(exact(gradient).norm())
    if not length or not all(sizes):
        return {}
    losses, changes, smoothness = [loss], [], []
    start = [parameter.detach().clone() for parameter in trial.parameters]
    for size in sizes:
        for parameter, before in zip(trial.parameters, start, strict=True):
            parameter.data.copy_(before)
        trial.move(-size * gradient)
        there, new = trial.gradient(batches)
        losses.append(there)
        changes.append(float((exact(new) - exact(gradient)).norm()))
        smoothness.append(changes[-1] / (size * length))
    return {
        "landscape/loss_min": min(losses),
        "landscape/loss_max": max(losses),
        "landscape/loss_range": max(losses) - min(losses),
        "landscape/gradient_change_min": min(changes),
        "landscape/gradient_change_max": max(changes),
        "landscape/gradient_change_range": max(changes) - min(changes),
        "landscape/smoothness": max(smoothness),
    }
