"""Multilayer perceptron for feature vectors, such as table rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ablab.models.checks import check_positive, check_probabilities
from ablab.models.interface import NormFactory


class MLP(nn.Module):
    """A multilayer perceptron: hidden layers of linear, norm, ReLU and dropout, then a linear head.

    Args:
        in_features: number of input features.
        num_outputs: number of outputs (logits, or regression targets).
        norm: factory of the norm layers.
        hidden_sizes: features of each hidden layer; an empty list gives a linear model.
        dropout: dropout probability after each hidden layer.

    Shape:
        vectors `(N, in_features)` -> predictions `(N, num_outputs)`

    Raises:
        ValueError: a size is below 1, or the dropout probability is out of range.
    """

    takes: ClassVar = ("vectors",)

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        *,
        norm: NormFactory,
        hidden_sizes: Sequence[int] = (64, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(**{f"hidden_sizes[{i}]": size for i, size in enumerate(hidden_sizes)})
        check_probabilities(dropout=dropout)
        sizes = (in_features, *hidden_sizes)
        self.linears = nn.ModuleList(linear(sizes[i], size, norm) for i, size in enumerate(hidden_sizes))
        self.norms = nn.ModuleList(norm(size, "vector", activation=nn.ReLU()) for size in hidden_sizes)
        self.dropout = nn.Dropout(dropout)
        head = nn.Linear(sizes[-1], num_outputs)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.head = norm.wrap(head)

    def forward(self, vectors: Tensor) -> Tensor:
        x = vectors
        for layer, norm in zip(self.linears, self.norms, strict=True):
            x = self.dropout(norm(layer(x)))
        return self.head(x)


def linear(in_features: int, out_features: int, norm: NormFactory) -> nn.Module:
    """Return a linear layer with He initialization, with a bias if the norm after it needs one."""
    layer = nn.Linear(in_features, out_features)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    if not norm.needs_bias:  # removed after init, so that all norms get the same weights for a seed
        layer.register_parameter("bias", None)
    return norm.wrap(layer)
