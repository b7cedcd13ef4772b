"""A multilayer perceptron for vectors, rows of a table for example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ablab.models.interface import NormFactory
from ablab.models.sizes import at_least_one, probabilities


class MLP(nn.Module):
    """Hidden linear layers, each with a norm, a ReLU and dropout behind it, and a linear head.

    Args:
        in_features: the features of a vector.
        num_outputs: the values to predict: logits of classes or labels, or numbers.
        norm: makes the norm layers.
        hidden_sizes: features of each hidden layer; an empty list is a linear model.
        dropout: the probability that a hidden value is zeroed in training.

    Shape:
        vectors `(N, in_features)` -> predictions `(N, num_outputs)`

    Raises:
        ValueError: a size below 1, or a probability out of range.
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
        at_least_one(**{f"hidden_sizes[{i}]": size for i, size in enumerate(hidden_sizes)})
        probabilities(dropout=dropout)
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
    """A linear layer with He initialization; it keeps its bias where the norm behind it has none."""
    layer = nn.Linear(in_features, out_features)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    if not norm.needs_bias:  # only now: the same seed draws the same weights for every norm
        layer.register_parameter("bias", None)
    return norm.wrap(layer)
