"""What the tests of measures share: problems small enough to have known answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.callbacks.diagnostics.diagnostic import TaskCopy
from ablab.data.batch import Batch
from ablab.tasks.task import Task


class Regression(Task):
    """Half the mean squared error, summed over outputs."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return 0.5 * (logits - batch.targets).square().sum(-1).mean()

    def update(self, *arguments: Any) -> None:
        """No metrics."""


@pytest.fixture
def copy_task() -> Callable[[nn.Module], TaskCopy]:
    """A copy of a regression of a model, in float64."""

    def make(model: nn.Module) -> TaskCopy:
        nothing: Any = None
        return TaskCopy(Regression(model=model, optimizer=nothing, scheduler=nothing).double())

    return make


@pytest.fixture
def samples() -> Callable[..., Batch]:
    """Samples of a linear relation with noise, in float64."""

    def make(num: int, features: int = 3, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(num, features, generator=generator, dtype=torch.float64)
        inputs = inputs * torch.arange(1, features + 1)
        noise = torch.randn(num, 1, generator=generator, dtype=torch.float64)
        return Batch(inputs, inputs.sum(-1, keepdim=True) + noise)

    return make
