"""Recurrent networks with norms inside the recurrence: Elman, GRU and LSTM, uni- or bidirectional."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ablab.models.checks import check_positive, check_probabilities
from ablab.models.interface import NormFactory
from ablab.models.sequences import num_outputs, zero_padding


class RNN(nn.Module):
    """A recurrent network for sequence classification or language modelling.

    Reads tokens if `vocab_size` is given, else vectors of `in_features`. If `num_classes` is given, classifies the
    sequence from the final states; else predicts the next token at every step (unidirectional only).

    Args:
        in_features: number of features per step.
        vocab_size: vocabulary size.
        num_classes: number of classes.
        context_length: length of the longest sequence, for norms with per-step statistics.
        norm: factory of the norm layers.
        cell: "elman", "gru" or "lstm".
        hidden_size: features of the state, per direction.
        num_layers: number of stacked recurrent layers.
        bidirectional: read every sequence in both directions.
        dropout: dropout probability between layers and before the head.

    Shape:
        vectors `(N, L, in_features)` or tokens `(N, L)`, `valid` `(N, L)` True for real steps, which precede padding
        -> class logits `(N, num_classes)` or token logits `(N, L, vocab_size)`

    Raises:
        ValueError: the sizes are inconsistent, or a sequence is longer than `context_length`.

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
        check_positive(hidden_size=hidden_size, num_layers=num_layers)
        check_probabilities(dropout=dropout)
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
        x = self.embed(zero_padding(inputs, valid))
        last = x
        for i, directions in enumerate(self.layers):
            x = self.dropout(x) if i > 0 else x
            read = [cell(x, valid) for cell in directions.children()]
            x = torch.cat([outputs for outputs, _ in read], dim=-1)
            last = torch.cat([state for _, state in read], dim=-1)
        return self.head(self.dropout(x if self.causal else last))


class Cell(nn.Module, ABC):
    """Base class: one direction of one recurrent layer.

    The input projection is computed and normalized for all steps at once, the state projection step by step. Without
    norms, this equals torch's layer of the same name, with the gates of the weights in the same order.

    Args:
        in_features: features of the input at each step.
        hidden_size: features of the state.
        norm: factory of the norm layers.
        num_steps: length of the longest sequence.
        backward: read each sequence from its last real step to its first.

    Shape:
        `(N, T, in_features)`, `valid` `(N, T)` -> outputs `(N, T, hidden_size)`, final output `(N, hidden_size)`
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

    def initial_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the zero state for a batch like `x`; its first tensor is the output."""
        return (x.new_zeros(x.shape[0], self.hidden_size),)

    @abstractmethod
    def next_state(
        self,
        from_input: Tensor,
        from_state: Tensor,
        state: tuple[Tensor, ...],
        valid: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        """Return the next state, from the normalized projections `(N, gates)` of the input and of the state."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.backward:
            x = reverse(x, valid)
        from_input = self.norm_input(self.input(x), valid).unbind(1)
        # a reparametrized weight is recomputed at every access, so access it once per sequence
        weight, bias = self.recurrent.weight.t(), self.recurrent.bias  # type: ignore[operator]
        state = self.initial_state(x)
        outputs = []
        for step, projected in enumerate(from_input):
            is_real = None if valid is None else valid[:, step]
            from_state = state[0] @ weight if bias is None else torch.addmm(bias, state[0], weight)  # type: ignore[arg-type]
            from_state = self.norm_recurrent(from_state, is_real, step)
            new = self.next_state(projected, from_state, state, is_real, step)
            if is_real is None:
                state = new
            else:  # padding keeps the previous state
                state = tuple(torch.where(is_real[:, None], a, b) for a, b in zip(new, state, strict=True))
            outputs.append(state[0])
        stacked = torch.stack(outputs, 1)
        return (reverse(stacked, valid) if self.backward else stacked), state[0]


class ElmanCell(Cell):
    """h' = tanh(N(W x) + N(U h)), with N the norm."""

    num_gates = 1

    def next_state(
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

    def next_state(
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

    The cell state c itself is not normalized, only its contribution to the output (Cooijmans et al. 2016).
    """

    num_gates = 4

    def __init__(
        self, in_features: int, hidden_size: int, *, norm: NormFactory, num_steps: int, backward: bool = False
    ) -> None:
        super().__init__(in_features, hidden_size, norm=norm, num_steps=num_steps, backward=backward)
        self.norm_cell = norm.recurrent(hidden_size, "cell", num_steps=num_steps)

    def initial_state(self, x: Tensor) -> tuple[Tensor, ...]:
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        return (zeros, zeros)

    def next_state(
        self,
        from_input: Tensor,
        from_state: Tensor,
        state: tuple[Tensor, ...],
        valid: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        i, f, g, o = torch.unsafe_chunk(from_input + from_state, 4, -1)  # chunk is slower: it returns views
        c = torch.addcmul(torch.sigmoid(f) * state[1], torch.sigmoid(i), torch.tanh(g))
        return (torch.sigmoid(o) * torch.tanh(self.norm_cell(c, valid, step)), c)


CELLS: dict[str, type[Cell]] = {"elman": ElmanCell, "gru": GRUCell, "lstm": LSTMCell}


def reverse(x: Tensor, valid: Tensor | None) -> Tensor:
    """Reverse the real steps of each sequence `(N, T, C)` and keep the padding at the end."""
    if valid is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device).expand(valid.shape)
    lengths = valid.sum(1, keepdim=True)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def linear(in_features: int, out_features: int, *, bias: bool, bound: float, norm: NormFactory) -> nn.Module:
    """Return a linear layer initialized uniformly within ±bound, like torch's recurrent layers."""
    layer = nn.Linear(in_features, out_features)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound)
    if not bias:  # removed after init, so that all norms get the same weights for a seed
        layer.register_parameter("bias", None)
    return norm.wrap(layer)
