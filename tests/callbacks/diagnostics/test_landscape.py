"""The landscape of a quadratic, whose smoothness is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ablab.callbacks.diagnostics.diagnostic import TaskCopy, split_batch
from ablab.callbacks.diagnostics.landscape import along_gradient
from ablab.data.batch import Batch
from ablab.lab.loggers.csv_file import read_rows


def test_along_the_gradient_of_a_quadratic_all_numbers_are_known(
    copy_task: Callable[[nn.Module], TaskCopy], samples: Callable[..., Batch]
) -> None:
    copy, batch = copy_task(nn.Linear(3, 1, bias=False)), samples(12)
    hessian = batch.inputs.T @ batch.inputs / 12
    loss, g = copy.gradient([batch])
    sizes = [0.01, 0.05, 0.5]
    found = along_gradient(copy, split_batch(batch, 5), sizes)
    losses = [loss, *(float(loss - s * g @ g + s * s / 2 * g @ hessian @ g) for s in sizes)]
    changes = [float((s * hessian @ g).norm()) for s in sizes]
    assert found == pytest.approx(
        {
            "landscape/loss_min": min(losses),
            "landscape/loss_max": max(losses),
            "landscape/loss_range": max(losses) - min(losses),
            "landscape/gradient_change_min": changes[0],
            "landscape/gradient_change_max": changes[-1],
            "landscape/gradient_change_range": changes[-1] - changes[0],
            "landscape/smoothness": float((hessian @ g).norm() / g.norm()),
        },
        rel=1e-9,
    )
    assert found["landscape/smoothness"] <= float(torch.linalg.eigvalsh(hessian)[-1])


def test_where_no_step_can_be_taken_nothing_is_logged(run: Callable[..., SimpleNamespace]) -> None:
    words = ["+callbacks/measure=landscape", "model=rnn", "callbacks.landscape.num_samples=32", "optimizer.lr=0"]
    sizes = ["callbacks.landscape.multiples=null", "callbacks.landscape.step_sizes=[0.1]"]
    for more, steps in (([], []), (sizes, [0, 1])):
        done = run(*words, *more)
        rows = [row for row in read_rows(done.folder) if "landscape/smoothness" in row]
        assert [row["step"] for row in rows] == steps
