"""Sharpness: the largest eigenvalue of the loss's Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ablab.callbacks.diagnostics.diagnostic import SAMPLE_SEED, Diagnostic, TaskCopy, check_at_least
from ablab.data.batch import Batch
from ablab.data.rng import make_generator


class Sharpness(Diagnostic):
    """The largest eigenvalue λ of the training loss's Hessian H, on fixed samples.

    Runs Lanczos iterations with Hessian-vector products by double backward, until the residual ‖H u − λ u‖ of the Ritz
    vector u is at most `tolerance` · |λ|; H then has an eigenvalue within that distance of λ. Each iteration stores one
    vector of the size of the model. λ is the algebraically largest eigenvalue, not the largest in magnitude.

    With norms that depend on the batch, the loss is the mean over mini-batches of the run's size, normalized by their
    own statistics as in training, and derivatives include the statistics. Under spectral norm, the singular vectors are
    constants, as in training. Dropout is off. Full-batch gradient descent is unstable for λ · lr above 2.

    Logs `sharpness/eigenvalue`, `sharpness/eigenvalue_times_lr` (with the learning rate of the next step),
    `sharpness/residual` (relative to |λ|; above `tolerance` if `max_iterations` was reached) and
    `sharpness/iterations`.

    Args:
        tolerance: tolerance of the residual, relative to the eigenvalue.
        max_iterations: maximum number of Hessian-vector products.
        every_n_steps, num_samples: see `Diagnostic`.

    Raises:
        ValueError: the tolerance is not between 0 and 1.

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
        check_at_least(1, max_iterations=max_iterations)
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance}: a share of the eigenvalue; choose one above 0 and below 1")
        self.tolerance = tolerance
        self.max_iterations = max_iterations

    def measure(self, task_copy: TaskCopy, batches: list[Batch], lr: float) -> Mapping[str, float]:
        size = sum(parameter.numel() for parameter in task_copy.parameters)
        start = torch.randn(size, generator=make_generator(SAMPLE_SEED)).to(task_copy.parameters[0])
        with task_copy.twice_differentiable():
            found = largest_eigenvalue(
                lambda vector: task_copy.hessian_product(batches, vector), start, self.tolerance, self.max_iterations
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
    """Compute the largest eigenvalue of a symmetric operator, by Lanczos with full reorthogonalization.

    Args:
        product: the operator.
        start: start vector, not orthogonal to the eigenvector.
        tolerance: tolerance of the residual, relative to the eigenvalue.
        max_iterations: maximum number of products.

    Returns:
        The eigenvalue, the residual of its Ritz vector, and the number of products.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        w = product(basis[-1])
        diagonal.append(float(torch.dot(w, basis[-1])))
        if not w.isfinite().all():
            return diagonal[-1], float("nan"), len(basis)
        for _ in range(2):  # twice, against rounding errors
            for vector in basis:
                w = w - torch.dot(w, vector) * vector
        length = float(w.norm())
        off = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        value, residual = float(values[-1]), length * abs(float(vectors[-1, -1]))
        if residual <= tolerance * abs(value) or len(basis) in (max_iterations, len(start)):
            return value, residual, len(basis)
        off_diagonal.append(length)
        basis.append(w / length)
