"""Any text, for language modelling by characters or bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablab.data.datamodule import Batch, DataModule, Kind, Splits

IGNORED = -100  # the target that torch's cross entropy leaves out


class Text(DataModule):
    """A text in consecutive windows of `context_length` tokens, each predicting the token that follows.

    The first part of the text is for training, the next for validation, the last for testing.

    Args:
        path: a UTF-8 file, or a folder whose files are read in the order of their names; None takes the
            documentation of Python's keywords and topics, which every Python ships.
        tokens: "characters", an alphabet of those that occur; or "bytes", always 256.
        context_length: tokens of a window.
        val_fraction, test_fraction: the shares of the text held out from its end.
        batch_size, seed, num_workers: see `DataModule`.

    Shape:
        inputs `(N, context_length)`, targets `(N, context_length)`

    Raises:
        ValueError: no such file or folder, a file that is not UTF-8, or too little text.
    """

    kind: ClassVar[Kind] = "text"

    def __init__(
        self,
        *,
        path: str | None = None,
        tokens: Literal["characters", "bytes"] = "characters",
        context_length: int = 128,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        if context_length < 1:
            raise ValueError(f"context_length={context_length}: a window has at least one token")
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"val_fraction={val_fraction}, test_fraction={test_fraction}: both are more than 0, and training needs "
                "the rest of the text"
            )
        self.path = path
        self.tokens = tokens
        self.context_length = context_length
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def read(self) -> Splits:
        text = read_text(self.path)
        self.vocabulary = sorted(set(text)) if self.tokens == "characters" else [chr(byte) for byte in range(256)]
        self.numbers = {token: number for number, token in enumerate(self.vocabulary)}
        stream = self.encode(text)
        self.characters_per_token = len(text) / max(1, len(stream))
        held_out = [int(len(stream) * share) for share in (self.val_fraction, self.test_fraction)]
        train, val, test = stream.split([len(stream) - sum(held_out), *held_out])
        needed = self.context_length + 1
        if min(len(train), len(val), len(test)) < needed:
            raise ValueError(
                f"path={self.path or 'null'}: the text has {len(stream)} tokens, and its parts ({len(train)} to train, "
                f"{len(val)} to validate, {len(test)} to test) need at least {needed} each; give more text, or a "
                "smaller data.context_length"
            )
        length = self.context_length
        return Splits(
            train=Windows(train, length, keep_short=False),
            val=Windows(val, length, keep_short=True),
            test=Windows(test, length, keep_short=True),
        )

    def encode(self, text: str) -> Tensor:
        """Token numbers `(len)` of a text."""
        if self.tokens == "bytes":
            return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        return torch.tensor([self.numbers[character] for character in text])

    def decode(self, tokens: Tensor) -> str:
        """The text of token numbers `(len)`; bytes that form no character become �."""
        if self.tokens == "bytes":
            return bytes(tokens.tolist()).decode(errors="replace")
        return "".join(self.vocabulary[token] for token in tokens.tolist())

    @property
    def model_sizes(self) -> dict[str, int]:
        return {"vocab_size": len(self.vocabulary), "context_length": self.context_length}

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"characters_per_token": self.characters_per_token}


class Windows(Dataset[Batch]):
    """Consecutive windows of a token stream; with `keep_short` the last is padded, so that every token counts once."""

    def __init__(self, stream: Tensor, length: int, *, keep_short: bool) -> None:
        self.stream = stream
        self.length = length
        predictable = len(stream) - 1
        self.num_windows = -(-predictable // length) if keep_short else predictable // length

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, indices: list[int]) -> Batch:
        positions = torch.tensor(indices)[:, None] * self.length + torch.arange(self.length)
        last = len(self.stream) - 1
        inputs = self.stream[positions.clamp(max=last)]
        targets = self.stream[(positions + 1).clamp(max=last)]
        return Batch(inputs, targets.masked_fill(positions >= last, IGNORED))


def read_text(path: str | None) -> str:
    """The text of a file, of a folder's files, or of Python's own documentation."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    place = Path(path)
    if not place.exists():
        raise ValueError(f"path={path}: there is no such file or folder; give a UTF-8 text, or null for the default")
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"path={path}: the folder is empty; give one that has UTF-8 text files")
    texts = []
    for file in files:
        try:
            texts.append(file.read_bytes().decode("utf-8"))  # read_text would change line ends
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(
                f"path={path}: {file} is not UTF-8 (byte {error.start} is 0x{byte:02x}); convert it, or leave it out"
            ) from error
        except OSError as error:
            raise ValueError(f"path={path}: {file} cannot be read ({error.strerror})") from error
    return "\n".join(texts)
