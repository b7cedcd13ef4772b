"""Tokenizers: characters, bytes, or byte-pair encoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Tokens(ABC):
    """Base class of tokenizers."""

    entries: list[str]

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Encode a text to token indices `(len)`, int32."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """Decode token indices `(len)` to text."""


class Characters(Tokens):
    """A character tokenizer, with the characters that occur in a text."""

    def __init__(self, text: str) -> None:
        self.entries = sorted(set(text))
        self.codes = torch.tensor([ord(entry) for entry in self.entries], dtype=torch.int32)

    def encode(self, text: str) -> Tensor:
        if not text:
            return torch.tensor([], dtype=torch.int32)
        codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
        tokens = torch.searchsorted(self.codes, codes).clamp(max=len(self.codes) - 1)
        if not torch.equal(self.codes[tokens], codes):
            strange = sorted(set(text) - set(self.entries))
            raise ValueError(f"the vocabulary has no {', '.join(map(repr, strange))}")
        return tokens.int()

    def decode(self, tokens: Tensor) -> str:
        return "".join(self.entries[token] for token in tokens.tolist())


class Bytes(Tokens):
    """A tokenizer of UTF-8 bytes; invalid sequences are decoded as �."""

    entries = [chr(byte) for byte in range(256)]  # noqa: RUF012

    def encode(self, text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).int() if text else torch.tensor([]).int()

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode(errors="replace")


class BytePairs(Tokens):
    """Byte-level byte-pair encoding, which can encode any text.

    Args:
        tokenizer: JSON of a trained `tokenizers.Tokenizer`.

    References:
        Sennrich et al. 2015, https://arxiv.org/abs/1508.07909; Radford et al. 2019 (over bytes)
    """

    def __init__(self, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_str(tokenizer)
        self.entries = [str(self.tokenizer.id_to_token(number)) for number in range(self.tokenizer.get_vocab_size())]

    @classmethod
    def train(cls, text: str, vocab_size: int) -> BytePairs:
        """Train a tokenizer on a text, with `vocab_size` entries including the 256 bytes."""
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        except ImportError as error:
            raise ValueError("tokens=bpe: it needs one more package: pip install -e '.[data]'") from error
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size}: at least 257 are needed, as the 256 bytes are among them")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        lines = text.splitlines(keepends=True)
        tokenizer.train_from_iterator((line for line in lines), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> Tensor:
        # Lines are encoded in parallel. The result is the same, since no pair crosses the end of a line.
        return torch.tensor(
            [number for piece in self.tokenizer.encode_batch(text.splitlines(keepends=True)) for number in piece.ids],
            dtype=torch.int32,
        )

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens.tolist())
