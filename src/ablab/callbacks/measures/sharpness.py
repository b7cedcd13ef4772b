"""How curved the loss is where it is curved most."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ablab.callbacks.measures.measure import PROBE, Measure, Trial, at_least
from ablab.data.batch import Batch
from ablab.data.draws import generator


class Sharpness(Measure):
    """The largest eigenvalue λ of the training loss's Hessian, on fixed samples.

    Lanczos' iteration with products H v by double backward, until the residual ‖H u − λ u‖ of the Ritz vector u is at
    most `tolerance` · |λ|: an eigenvalue of H then lies within that of λ. It keeps a vector as large as the model for
    each iteration. The largest eigenvalue is meant, not the largest in size.

    With norms that see the batch, the loss is the mean over mini-batches of the run's own size, each normalized by its
    own statistics as in training, and the derivative goes through the statistics. Under spectral norm the singular
    vectors count as constants, as in training. Dropout is off. For plain gradient descent with the full batch, λ · lr
    above 2 is unstable.

    Logs `sharpness/eigenvalue`, `sharpness/eigenvalue_times_lr` (by the rate of the step that follows),
    `sharpness/residual` (over |λ|; above `tolerance` where `max_iterations` was reached) and `sharpness/iterations`.

    Args:
        tolerance: of the residual, as a share of the eigenvalue.
        max_iterations: products H v at most.
        every_n_steps, num_samples: see `Measure`.

    Raises:
        ValueError: a tolerance that is not above 0 and below 1.

    References:
        Lanczos 1950; Golub & Van Loan 2013, chapter 10
        Cohen et al. 2021 (edge of stability), https://arxiv.org/abs/2103.00065
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 200,
        num_samples: int = 256,
        tolerance: float = 0.01,
        max_iterations: int = 50,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, num_samples=num_samples)
        at_least(1, max_iterations=max_iterations)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance}: a share of the eigenvalue; choose one above 0 and below 1")
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def measure(self, trial: Trial, batches: list[Batch], lr: float) -> Mapping[str, float]:
        size = sum(parameter.numel() for parameter in trial.parameters)
        start = torch.randn(size, generator=generator(PROBE)).to(trial.parameters[0])
        with trial.twice_differentiable():
            found = largest_eigenvalue(
                lambda vector: trial.curvature(batches, vector), start, self.tolerance, self.max_iterations
            )
        value, residual, iterations = found
        return {
            "sharpness/eigenvalue": value,
            "sharpness/eigenvalue_times_lr": value * lr,
            "sharpness/residual": residual / abs(value) if value else 0.0,
            "sharpness/iterations": float(iterations),
        }


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, max_iterations: int
) -> tuple[float, float, int]:
    """The largest eigenvalue of a symmetric operator, by Lanczos with full reorthogonalization.

    Args:
        product: the operator.
        start: any vector that is not orthogonal to the eigenvector.
        tolerance: of the residual, as a share of the eigenvalue.
        max_iterations: products at most.

    Returns:
        The eigenvalue, the residual of its Ritz vector, and how many products were taken.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = product(basis[-1])
        diagonal.append(float(torch.dot(w, basis[-1])))
        if not w.isfinite().all():
            return diagonal[-1], float("nan"), len(basis)
        for _ in range(2):  # once more for what rounding leaves
            for vector in basis:
                w = w - torch.dot(w, vector) * vector
        length = float(w.norm())
        off = torch.tensor(beside, dtype=torch.float64)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        value, residual = float(values[-1]), length * abs(float(vectors[-1, -1]))
        if residual <= tolerance * abs(value) or len(basis) in (max_iterations, len(start)):
            return value, residual, len(basis)
        beside.append(length)
        basis.append(w / length)
