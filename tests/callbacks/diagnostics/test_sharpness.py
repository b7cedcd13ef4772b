"""The largest eigenvalue, against matrices and Hessians whose eigenvalues are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.callbacks.diagnostics.diagnostic import TaskCopy, length_and_direction, split_batch
from ablab.callbacks.diagnostics.sharpness import largest_eigenvalue
from ablab.data.batch import Batch
from ablab.lab.loggers.csv_file import read_rows

Make = Callable[[nn.Module], TaskCopy]
Draw = Callable[..., Batch]


def matrix(*values: float, size: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues, and `size` more between −1 and 1."""
    spectrum = torch.cat([torch.tensor(values), torch.linspace(-1, 1, size)]).double()
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum)).double())
    return (q * spectrum) @ q.T


@pytest.mark.parametrize("values", [(5.0,), (5.0, 4.9), (2.0, -30.0), (5.0, 5.0, 5.0)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-8])
def test_it_is_the_largest_and_not_the_largest_in_size(values: tuple[float, ...], tolerance: float) -> None:
    a = matrix(*values, size=60)
    found, residual, iterations = largest_eigenvalue(lambda v: a @ v, torch.randn(len(a)).double(), tolerance, 60)
    assert residual <= tolerance * found
    assert found == pytest.approx(values[0], rel=tolerance if values != (5.0, 4.9) else 0.02)
    assert iterations < 60


def test_all_negative_and_all_zero_are_found_too() -> None:
    start = torch.randn(20).double()
    below = matrix(*torch.linspace(-9, -2, 20).tolist())
    assert largest_eigenvalue(lambda v: below @ v, start, 1e-8, 40)[0] == pytest.approx(-2, rel=1e-7)
    assert largest_eigenvalue(lambda v: 0 * v, start, 0.01, 40) == (0.0, 0.0, 1)
    assert largest_eigenvalue(lambda v: v / 0, start, 0.01, 40)[2] == 1, "no endless search"


def test_it_stops_where_it_is_told_to_and_says_how_far_it_is() -> None:
    a = matrix(1.01, size=300)
    found, residual, iterations = largest_eigenvalue(lambda v: a @ v, torch.randn(301).double(), 1e-6, 5)
    assert iterations == 5
    assert residual > 1e-6 * found
    assert abs(found - float(torch.linalg.eigvalsh(a)[-1])) <= residual


def test_of_a_quadratic_it_is_exact(copy_task: Make, samples: Draw) -> None:
    copy, batch = copy_task(nn.Linear(3, 1, bias=False)), samples(12)
    batches = split_batch(batch, 5)
    found, _, _ = largest_eigenvalue(lambda v: copy.hessian_product(batches, v), torch.randn(3).double(), 1e-10, 10)
    hessian = batch.inputs.T @ batch.inputs / 12
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-10)


def test_products_are_those_of_the_whole_hessian(copy_task: Make, samples: Draw) -> None:
    copy, batch = copy_task(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 1))), samples(12)
    named = {name: p.detach() for name, p in copy.model.named_parameters()}
    start = torch.cat([p.flatten() for p in named.values()])

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([p.numel() for p in named.values()])
        given = {name: piece.view_as(p) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        parts = [torch.func.functional_call(copy.model, given, part.inputs) for part in split_batch(batch, 6)]
        errors = torch.cat(parts) - batch.targets
        return 0.5 * errors.square().sum(-1).mean()

    hessian = torch.autograd.functional.hessian(loss, start)
    assert isinstance(hessian, Tensor)
    vector = torch.randn_like(start)
    torch.testing.assert_close(
        copy.hessian_product(split_batch(batch, 6), vector), hessian @ vector, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(
    "words",
    [["norm=batchnorm"], ["norm=weightnorm"], ["model=transformer"], ["model=rnn"]],
)
def test_products_of_every_model_are_differences_of_gradients(config: Callable[..., Any], words: list[str]) -> None:
    from ablab.lab.train import assemble

    parts = assemble(config(*words, "callbacks.samples=null"))
    copy = TaskCopy(parts.task.double())
    for parameter in copy.parameters:  # away from zero-initialized gains, where ReLU has kinks
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    batch = parts.data.example(1)
    batches = split_batch(batch._replace(inputs=batch.inputs.double(), seeds=None), 8)
    vector = torch.cat([torch.randn_like(p).flatten() for p in copy.parameters])
    vector /= vector.norm()
    with copy.twice_differentiable():
        product = copy.hessian_product(batches, vector)
        step = 1e-6
        copy.add_to_weights(step * vector)
        _, ahead = copy.gradient(batches)
        copy.add_to_weights(-2 * step * vector)
        _, behind = copy.gradient(batches)
    difference = (ahead - behind) / (2 * step)
    assert float((product - difference).norm() / difference.norm()) < 1e-3


def test_a_run_logs_it_to_its_tolerance(run: Callable[..., SimpleNamespace]) -> None:
    words = ["model=rnn", "model.hidden_size=16", "callbacks.sharpness.num_samples=32"]
    done = run("+callbacks/measure=sharpness", *words)
    rows = [row for row in read_rows(done.folder) if "sharpness/eigenvalue" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert 0 < row["sharpness/residual"] <= 0.01
        assert row["sharpness/eigenvalue"] > 0
    ratio = rows[0]["sharpness/eigenvalue_times_lr"] / rows[0]["sharpness/eigenvalue"]
    first = next(row for row in read_rows(done.folder) if "train/lr" in row)
    assert ratio == pytest.approx(first["train/lr"], rel=1e-6)


def test_the_formula_of_weight_norm_is_what_torch_computes_and_has_a_second_derivative(copy_task: Make) -> None:
    for dim in (0, 1):
        g, v = torch.rand((4, 1) if dim == 0 else (1, 3)).double(), torch.randn(4, 3).double()
        torch.testing.assert_close(length_and_direction(g, v, dim=dim), torch._weight_norm(v, g, dim))
        of = (g.requires_grad_(), v.requires_grad_())
        assert torch.autograd.gradgradcheck(lambda g, v, dim=dim: length_and_direction(g, v, dim=dim), of)
    copy = copy_task(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2), dim=None))
    x = torch.randn(5, 3).double()
    before = copy.model(x)
    with copy.twice_differentiable():
        torch.testing.assert_close(copy.model(x), before)
