"""Recurrent networks with the norm inside the recurrence: Elman, GRU and LSTM cells, in one or both directions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ablab.models.interface import NormFactory
from ablab.models.sequences import num_outputs, without_padding
from ablab.models.sizes import at_least_one, probabilities


class RNN(nn.Module):
    """A recurrent network over sequences; what it reads and what it predicts follow from the sizes it is given.

    Reads tokens if `vocab_size` is given, else vectors of `in_features`. Classifies the sequence from its last states
    if `num_classes` is given, else predicts the next token at every step (in one direction only).

    Args:
        in_features: numbers in each step's vector.
        vocab_size: distinct tokens.
        num_classes: the classes to tell apart.
        context_length: the longest sequence, for norms that keep statistics for each step.
        norm: makes the norm layers.
        cell: "elman", "gru" or "lstm".
        hidden_size: features of the state, in each direction.
        num_layers: recurrent layers, each reading the one before.
        bidirectional: read every sequence in both directions.
        dropout: probability of dropping a feature between layers and before the head.

    Shape:
        vectors `(N, L, in_features)` or tokens `(N, L)`, `valid` `(N, L)` True for real steps, which come first
        -> class logits `(N, num_classes)` or token logits `(N, L, vocab_size)`

    Raises:
        ValueError: sizes that do not go together, or a sequence longer than `context_length`.

    References:
        Elman 1990; Hochreiter & Schmidhuber 1997; Cho et al. 2014, https://arxiv.org/abs/1406.1078
        Norm inside the cells: Ba et al. 2016, https://arxiv.org/abs/1607.06450; Cooijmans et al. 2016,
        https://arxiv.org/abs/1603.09025
    """

    takes: ClassVar = ("sequences", "text")

    def __init__(
        self,
        *,
        in_features: int | None = None,
        vocab_size: int | None = None,
        num_classes: int | None = None,
        context_length: int,
        norm: NormFactory,
        cell: Literal["elman", "gru", "lstm"] = "lstm",
        hidden_size: int = 128,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        at_least_one(hidden_size=hidden_size, num_layers=num_layers)
        probabilities(dropout=dropout)
        outputs = num_outputs(in_features, vocab_size, num_classes)
        if num_classes is None and bidirectional:
            raise ValueError(
                "bidirectional=true: a network that predicts the next token must not read it from behind; "
                "set model.bidirectional=false"
            )
        self.causal = num_classes is None
        self.context_length = context_length
        self.embed = nn.Identity() if vocab_size is None else nn.Embedding(vocab_size, hidden_size)
        directions = 2 if bidirectional else 1
        width = in_features if in_features is not None else hidden_size
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            self.layers.append(
                nn.ModuleList(
                    CELLS[cell](width, hidden_size, norm=norm, num_steps=context_length, backward=backward)
                    for backward in (False, True)[:directions]
                )
            )
            width = hidden_size * directions
        self.dropout = nn.Dropout(dropout)
        self.head = linear(width, outputs, bias=True, bound=1 / math.sqrt(width), norm=norm)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        if inputs.shape[1] > self.context_length:
            raise ValueError(
                f"a sequence of {inputs.shape[1]} steps is longer than context_length={self.context_length}"
            )
        x = self.embed(without_padding(inputs, valid))
        last = x
        for i, directions in enumerate(self.layers):
            x = self.dropout(x) if i > 0 else x
            read = [cell(x, valid) for cell in directions.children()]
            x = torch.cat([outputs for outputs, _ in read], dim=-1)
            last = torch.cat([state for _, state in read], dim=-1)
        return self.head(self.dropout(x if self.causal else last))


class Cell(nn.Module, ABC):
    """One direction of one recurrent layer.

    The input's projection is computed, and normalized, for all steps at once; the state's step by step. Without norms
    this is torch's cell of the same name, with the same weights in the same order.

    Args:
        in_features: features of the input at each step.
        hidden_size: features of the state.
        norm: makes the norms inside.
        num_steps: the longest sequence.
        backward: read each sequence from its last real step to its first.

    Shape:
        `(N, T, in_features)`, `valid` `(N, T)` -> outputs `(N, T, hidden_size)`, last output `(N, hidden_size)`
    """

    num_gates: ClassVar[int]

    def __init__(
        self, in_features: int, hidden_size: int, *, norm: NormFactory, num_steps: int, backward: bool = False
    ) -> None:
        super().__init__()
        self.backward = backward
        self.hidden_size = hidden_size
        gates = self.num_gates * hidden_size
        bound = 1 / math.sqrt(hidden_size)
        self.input = linear(in_features, gates, bias=norm.needs_bias, bound=bound, norm=norm)
        self.recurrent = linear(hidden_size, gates, bias=norm.needs_bias, bound=bound, norm=norm)
        self.norm_input = norm.recurrent(gates, "input", num_steps=num_steps)
        self.norm_recurrent = norm.recurrent(gates, "recurrent", num_steps=num_steps)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """The zero state for a batch like `x`; its first tensor is the output."""
        return (x.new_zeros(x.shape[0], self.hidden_size),)

    @abstractmethod
    def advance(
        self,
        from_input: Tensor,
        from_state: Tensor,
        state: tuple[Tensor, ...],
        valid: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        """The next state, from the normalized projections `(N, gates)` of the input and of the state."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.backward:
            x = reverse(x, valid)
        from_input = self.norm_input(self.input(x), valid).unbind(1)
        # a reparametrized weight is computed at every access: once a sequence is enough
        weight, bias = self.recurrent.weight.t(), self.recurrent.bias  # type: ignore[operator]
        state = self.start(x)
        outputs = []
        for step, projected in enumerate(from_input):
            now = None if valid is None else valid[:, step]
            from_state = state[0] @ weight if bias is None else torch.addmm(bias, state[0], weight)  # type: ignore[arg-type]
            from_state = self.norm_recurrent(from_state, now, step)
            new = self.advance(projected, from_state, state, now, step)
            if now is None:
                state = new
            else:  # padding leaves the state as it was
                state = tuple(torch.where(now[:, None], a, b) for a, b in zip(new, state, strict=True))
            outputs.append(state[0])
        stacked = torch.stack(outputs, 1)
        return (reverse(stacked, valid) if self.backward else stacked), state[0]


class ElmanCell(Cell):
    """h' = tanh(N(W x) + N(U h)), with N the norm."""

    num_gates = 1

    def advance(
        self,
        from_input: Tensor,
        from_state: Tensor,
        state: tuple[Tensor, ...],
        valid: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        return (torch.tanh(from_input + from_state),)


class GRUCell(Cell):
    """r, z = σ(N(W x) + N(U h)); n = tanh(N(W x) + r · N(U h)); h' = (1 − z) · n + z · h."""

    num_gates = 3

    def advance(
        self,
        from_input: Tensor,
        from_state: Tensor,
        state: tuple[Tensor, ...],
        valid: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        input_r, input_z, input_n = from_input.chunk(3, -1)
        state_r, state_z, state_n = from_state.chunk(3, -1)
        reset = torch.sigmoid(input_r + state_r)
        update = torch.sigmoid(input_z + state_z)
        new = torch.tanh(input_n + reset * state_n)
        return (new + update * (state[0] - new),)


class LSTMCell(Cell):
    """i, f, o = σ(N(W x) + N(U h)), g = tanh(…); c' = f · c + i · g; h' = o · tanh(N(c')).

    The cell's own path c is never normalized, only what is read from it (Cooijmans et al. 2016).
    """

    num_gates = 4

    def __init__(
        self, in_features: int, hidden_size: int, *, norm: NormFactory, num_steps: int, backward: bool = False
    ) -> None:
        super().__init__(in_features, hidden_size, norm=norm, num_steps=num_steps, backward=backward)
        self.norm_cell = norm.recurrent(hidden_size, "cell", num_steps=num_steps)

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        return (zeros, zeros)

    def advance(
        self,
        from_input: Tensor,
        from_state: Tensor,
        state: tuple[Tensor, ...],
        valid: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        i, f, g, o = torch.unsafe_chunk(from_input + from_state, 4, -1)  # a plain chunk is slower: its parts are views
        c = torch.addcmul(torch.sigmoid(f) * state[1], torch.sigmoid(i), torch.tanh(g))
        return (torch.sigmoid(o) * torch.tanh(self.norm_cell(c, valid, step)), c)


CELLS: dict[str, type[Cell]] = {"elman": ElmanCell, "gru": GRUCell, "lstm": LSTMCell}


def reverse(x: Tensor, valid: Tensor | None) -> Tensor:
    """Turn the real steps of each sequence `(N, T, C)` around and leave the padding behind them where it is."""
    if valid is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device).expand(valid.shape)
    lengths = valid.sum(1, keepdim=True)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def linear(in_features: int, out_features: int, *, bias: bool, bound: float, norm: NormFactory) -> nn.Module:
    """A linear map with torch's initialization of recurrent layers: uniform within ±bound."""
    layer = nn.Linear(in_features, out_features)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    if not bias:  # only now: the same seed draws the same weights for every norm
        layer.register_parameter("bias", None)
    return norm.wrap(layer)
