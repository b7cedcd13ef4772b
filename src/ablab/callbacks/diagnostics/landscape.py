"""Smoothness of the loss along its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ablab.callbacks.diagnostics.diagnostic import Diagnostic, TaskCopy, to_float64
from ablab.data.batch import Batch


class Landscape(Diagnostic):
    """Loss and gradient along the line x − s ∇L(x), for several step sizes s.

    Measures the range of the loss, the range of the gradient change ‖∇L(x) − ∇L(x − s ∇L(x))‖, and the effective
    smoothness β = max_s ‖∇L(x) − ∇L(x − s ∇L(x))‖ / ‖s ∇L(x)‖, the largest gradient change per distance moved. L is
    the mean loss over fixed samples, in mini-batches of the run's size if a norm depends on the batch; the paper uses
    the batch of the step. The direction is that of the gradient, for every optimizer.

    Logs `landscape/loss_min`, `landscape/loss_max`, `landscape/loss_range` (over all s, including s = 0),
    `landscape/gradient_change_min`, `landscape/gradient_change_max`, `landscape/gradient_change_range` (over all s) and
    `landscape/smoothness` (β). Logs nothing if the learning rate or the gradient is 0.

    Args:
        multiples: step sizes as multiples of the current learning rate; None with `step_sizes`.
        step_sizes: absolute step sizes, instead of `multiples`.
        every_n_steps, num_samples: see `Diagnostic`.

    Raises:
        ValueError: step sizes are not above 0, or both or none of the lists are given.

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

    def measure(self, task_copy: TaskCopy, batches: list[Batch], lr: float) -> Mapping[str, float]:
        sizes = self.step_sizes or [multiple * lr for multiple in self.multiples or []]
        return along_gradient(task_copy, batches, sizes)


def along_gradient(task_copy: TaskCopy, batches: list[Batch], sizes: list[float]) -> dict[str, float]:
    """Return the values to log for the given step sizes; modifies the copy's weights."""
    loss, gradient = task_copy.gradient(batches)
    length = float(to_float64(gradient).norm())
    if not length or not all(sizes):
        return {}
    losses, changes, smoothness = [loss], [], []
    start = [parameter.detach().clone() for parameter in task_copy.parameters]
    for size in sizes:
        for parameter, before in zip(task_copy.parameters, start, strict=True):
            parameter.data.copy_(before)
        task_copy.add_to_weights(-size * gradient)
        there, new = task_copy.gradient(batches)
        losses.append(there)
        changes.append(float((to_float64(new) - to_float64(gradient)).norm()))
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
