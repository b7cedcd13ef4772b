"""Base class of text data sets for language modelling: a token stream, cut into windows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ablab.data.batch import Batch, Kind, Splits, Tensors
from ablab.data.datamodule import DataModule
from ablab.data.tokens import BytePairs, Bytes, Characters, Tokens
from ablab.digest import digest

IGNORED = -100  # target that F.cross_entropy ignores


class Parts(NamedTuple):
    """The splits of a text; the training split may consist of several pieces."""

    train: list[str]
    val: str
    test: str


class TokenStream(DataModule):
    """Base class of texts in consecutive windows of `context_length` tokens, for next-token prediction.

    A subclass implements `load`. The text is split into training, validation and test part, in this order. In
    cross-validation, the text before the test part is cut into equal blocks, one of which is for validation.

    Args:
        tokens: "characters" (the characters that occur in the text), "bytes" (UTF-8), or "bpe" (byte-pair encoding
            trained on the training split).
        vocab_size: vocabulary size of "bpe".
        context_length: number of tokens per window.
        val_fraction, test_fraction: fractions of the text held out from its end.
        settings: see `DataModule`.

    Shape:
        inputs `(N, context_length)`, targets `(N, context_length)`

    Raises:
        ValueError: a split has too little text, or a setting is out of range.
    """

    kind: ClassVar[Kind] = "text"

    def __init__(
        self,
        *,
        tokens: Literal["characters", "bytes", "bpe"] = "characters",
        vocab_size: int = 1024,
        context_length: int = 128,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        **settings: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, **settings)
        if context_length < 1:
            raise ValueError(f"context_length={context_length}: a window has at least one token")
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction={val_fraction}, test_fraction={test_fraction}: both are more than 0, and training needs "
                "the rest of the text"
            )
        self.token_kind = tokens
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.test_fraction = test_fraction

    @property
    @abstractmethod
    def source(self) -> str:
        """The setting that names the text, for error messages: `path=…`."""

    @abstractmethod
    def load(self) -> Parts:
        """Read the splits of the text."""

    def split_text(self, text: str) -> Parts:
        """Split a text into training, validation and test part."""
        begin, end, testing = split_points(len(text), self, self.test_fraction)
        return Parts([piece for piece in (text[:begin], text[end:testing]) if piece], text[begin:end], text[testing:])

    def read(self) -> Splits:
        parts = self.load()
        self.tokens = self.make_vocabulary(parts)
        train = [self.tokens.encode(piece) for piece in parts.train]
        val, test = self.tokens.encode(parts.val), self.tokens.encode(parts.test)
        self.characters_per_token = (len(parts.val) + len(parts.test)) / max(1, len(val) + len(test))
        lengths, needed = [max(map(len, train), default=0), len(val), len(test)], self.context_length + 1
        if min(lengths) < needed:
            raise ValueError(
                f"{self.source}: the text has {sum(map(len, train)) + len(val) + len(test)} tokens, and its parts "
                f"({lengths[0]} to train, {lengths[1]} to validate, {lengths[2]} to test) need at least {needed} each; "
                "give more text, or a smaller data.context_length"
            )
        return Splits(
            train=Windows(train, self.context_length, keep_short=False),
            val=Windows([val], self.context_length, keep_short=True),
            test=Windows([test], self.context_length, keep_short=True),
        )

    def make_vocabulary(self, parts: Parts) -> Tokens:
        if self.token_kind == "bytes":
            return Bytes()
        if self.token_kind == "bpe":
            return BytePairs.train("\n".join(parts.train), self.vocab_size)
        return Characters("".join([*parts.train, parts.val, parts.test]))

    def names(self) -> list[str]:
        return self.tokens.entries

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"vocab_size": len(self.tokens.entries), "context_length": self.context_length}

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"characters_per_token": self.characters_per_token}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "vocabulary": self.tokens.entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint has the same vocabulary and was trained on the same text."""
        known, own = state["vocabulary"], self.tokens.entries
        if known != own:
            new, gone = ([repr(e) for e in some if e not in set(rest)] for some, rest in ((own, known), (known, own)))
            difference = "; ".join(
                f"{what} {', '.join(entries[:5])}{' …' if len(entries) > 5 else ''}"
                for what, entries in (("this text's has also", new), ("and lacks", gone))
                if entries
            )
            raise ValueError(
                f"{self.source}: the checkpoint has another vocabulary, of {len(known)} tokens; "
                f"{difference or 'the order differs'}; give the text that it was trained on"
            )
        super().load_state_dict(state)


def split_points(length: int, data: DataModule, test_fraction: float) -> tuple[int, int, int]:
    """Return the start and end of the validation part of a text, and the start of the test part."""
    testing = length - int(length * test_fraction)
    if data.folds is None:
        return testing - int(length * data.val_fraction), testing, testing
    begin, end = (testing * fold // data.folds for fold in (data.fold, data.fold + 1))
    return begin, end, testing


class Windows(Tensors):
    """A split of consecutive windows of token streams.

    Args:
        streams: token streams `(len)`; windows do not cross from one into the next.
        length: number of tokens per window.
        keep_short: pad the last window of a stream, so that every token is predicted once, instead of dropping it.
    """

    def __init__(self, streams: Sequence[Tensor], length: int, *, keep_short: bool) -> None:
        self.stream = torch.cat(list(streams))
        self.length = length
        starts, lasts, begin = [], [], 0
        for stream in streams:
            predictable = max(0, len(stream) - 1)
            num = -(-predictable // length) if keep_short else predictable // length
            starts.append(begin + torch.arange(num) * length)
            lasts.append(torch.full((num,), begin + predictable))
            begin += len(stream)
        self.starts = torch.cat(starts)
        self.lasts = torch.cat(lasts)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def all(self) -> Sequence[Tensor]:
        return self.stream, self.starts, self.lasts

    def on(self, copies: dict[Tensor, Tensor]) -> Windows:
        moved = copy(self)
        moved.stream, moved.starts, moved.lasts = (copies[tensor] for tensor in self.all)
        return moved

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Batch:
        chosen = torch.as_tensor(indices).to(self.device, non_blocking=True)
        positions = self.starts[chosen, None] + torch.arange(self.length, device=self.device)
        last = self.lasts[chosen, None]
        inputs = self.stream[positions.minimum(last)].long()
        targets = self.stream[(positions + 1).minimum(last)].long()
        return Batch(inputs, targets.masked_fill(positions >= last, IGNORED))

    def digest(self) -> str:
        return digest(self.stream, self.starts, self.lasts)
