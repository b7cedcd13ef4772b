"""From text to numbers and back: characters, bytes, or byte pairs that were learned from the training text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Tokens(ABC):
    """A vocabulary, and how text is cut into its entries."""

    entries: list[str]

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Token numbers `(len)` of a text."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> str:
        """The text of token numbers `(len)`."""


class Characters(Tokens):
    """Every character that occurs in a text."""

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
    """The 256 bytes of UTF-8; those that form no character are decoded as �."""

    entries = [chr(byte) for byte in range(256)]  # noqa: RUF012

    def encode(self, text: str) -> Tensor:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).int() if text else torch.tensor([]).int()

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode(errors="replace")


class BytePairs(Tokens):
    """Byte-pair encoding over bytes, so that every text can be encoded.

    Args:
        tokenizer: a tokenizer's JSON.

    References:
        Sennrich et al. 2015, https://arxiv.org/abs/1508.07909; Radford et al. 2019 (over bytes)
    """

    def __init__(self, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_str(tokenizer)
        self.entries = [str(self.tokenizer.id_to_token(number)) for number in range(self.tokenizer.get_vocab_size())]

    @classmethod
    def learned(cls, text: str, vocab_size: int) -> BytePairs:
        """The most useful pairs of a text, until there are `vocab_size` entries, the 256 bytes among them."""
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
        # Pieces, so that long texts are encoded in parallel; no pair crosses from a line's end to the next line.
        return torch.tensor(
            [number for piece in self.tokenizer.encode_batch(text.splitlines(keepends=True)) for number in piece.ids],
            dtype=torch.int32,
        )

    def decode(self, tokens: Tensor) -> str:
        return self.tokenizer.decode(tokens.tolist())
