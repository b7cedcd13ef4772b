"""Batches, and the splits that they are taken from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ablab.digest import digest

Kind = Literal["images", "masks", "sequences", "vectors", "text"]

IGNORED_PIXEL = 255  # mask value of pixels excluded from loss and metrics, as in PASCAL VOC and Cityscapes


class Batch(NamedTuple):
    """Inputs, targets and optional further fields of a batch of samples.

    Shape:
        images: inputs `(N, C, H, W)`, targets `(N)`
        masks: inputs `(N, C, H, W)`, targets `(N, H, W)` with class indices, and 255 for ignored pixels
        sequences: inputs `(N, L, features)`, targets `(N)`, valid `(N, L)`, True for real steps
        vectors: inputs `(N, F)`, targets `(N)` with class indices, or `(N, K)` with labels or numbers
        text: inputs `(N, L)`, targets `(N, L)`, with -100 where there is nothing to predict
        seeds `(N, 2)`: seed and epoch of each training sample; see `ablab.data.rng`
        mixed `(N, num_classes)`: target distribution of mixed samples
        views `(N, num_views, C, H, W)`: augmented views, if the task requests them; `inputs` are then not augmented
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor | None = None
    seeds: Tensor | None = None
    mixed: Tensor | None = None
    views: Tensor | None = None

    def on(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device."""
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]

    def parts(self, largest: int | None) -> list[Batch]:
        """Split the batch into as few parts of at most `largest` samples as possible; sizes differ by at most one."""
        count = 1 if largest is None else -(-len(self.targets) // largest)
        if count == 1:
            return [self]
        pieces = [[None] * count if field is None else field.tensor_split(count) for field in self]
        return [Batch(*fields) for fields in zip(*pieces, strict=True)]


class Split(Protocol):
    """A split of a data set; indexed with a list of sample indices, it returns a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int]) -> Batch: ...

    def digest(self) -> str:
        """Return a hash of the content."""


@dataclass(frozen=True)
class Splits:
    """The disjoint splits of a data set."""

    train: Split
    val: Split
    test: Split


class Tensors(Dataset[Batch], ABC):
    """Base class of splits that consist of tensors: can be moved to a device, and indexed with a tensor."""

    @property
    @abstractmethod
    def all(self) -> Sequence[Tensor | None]:
        """The tensors that the split consists of."""

    @abstractmethod
    def on(self, copies: dict[Tensor, Tensor]) -> Self:
        """Return the split with its tensors replaced by their copies on a device."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(tensor.device for tensor in self.all if tensor is not None)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, indices: Sequence[int] | Tensor) -> Batch: ...

    @abstractmethod
    def digest(self) -> str:
        """Return a hash of the content."""


class Samples(Tensors):
    """A split of tensors in memory or in a memory-mapped file.

    Args:
        inputs, targets, valid: the tensors; the first dimension is that of samples.
        members: indices of the samples that belong to this split; None for all.
        content: hash of the tensors, if already known.
        digests: hashes of the samples' inputs `(N)`, see `sample_digest`, if already known.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        valid: Tensor | None = None,
        *,
        members: Tensor | None = None,
        content: str | None = None,
        digests: Tensor | None = None,
    ) -> None:
        assert len(inputs) == len(targets)
        self.tensors = Batch(inputs, targets, valid)
        self.members = members
        self.content = content
        self.known_digests = digests

    def __len__(self) -> int:
        return len(self.tensors.targets if self.members is None else self.members)

    @property
    def all(self) -> Sequence[Tensor | None]:
        return self.tensors

    def __getitem__(self, indices: Sequence[int] | Tensor) -> Batch:
        chosen = torch.as_tensor(indices).to(self.device, non_blocking=True)
        if self.members is not None:
            chosen = self.members.index_select(0, chosen)
        # index_select is about twenty times faster than indexing with brackets
        return Batch(*(None if t is None else t.index_select(0, chosen) for t in self.tensors))  # type: ignore[arg-type]

    @property
    def targets(self) -> Tensor:
        """The targets of this split's samples `(N)`."""
        return self.tensors.targets if self.members is None else self.tensors.targets[self.members]

    @property
    def digests(self) -> Tensor:
        """Hashes `(N)` of the inputs of this split's samples, including `valid`."""
        if self.known_digests is None:
            parts = [tensor.cpu().numpy() for tensor in (self.tensors.inputs, self.tensors.valid) if tensor is not None]
            rows = (b"".join(part[row].tobytes() for part in parts) for row in range(len(parts[0])))
            self.known_digests = torch.tensor([sample_digest(row) for row in rows], dtype=torch.int64)
        return self.known_digests if self.members is None else self.known_digests[self.members]

    def as_batch(self) -> Batch:
        """Return all samples of the split as one batch."""
        return self.tensors if self.members is None else self[range(len(self))]

    def part(self, members: Tensor) -> Samples:
        """Return a subset of the samples, which shares the tensors."""
        own = members if self.members is None else self.members[members]
        content = self.digest_of_tensors()
        return Samples(*self.tensors[:3], members=own, content=content, digests=self.known_digests)

    def on(self, copies: dict[Tensor, Tensor]) -> Samples:
        inputs, targets, valid, *_ = (None if tensor is None else copies[tensor] for tensor in self.tensors)
        assert inputs is not None
        assert targets is not None
        members = None if self.members is None else self.members.to(targets.device)
        return Samples(inputs, targets, valid, members=members, content=self.content)

    def digest_of_tensors(self) -> str:
        if self.content is None:
            self.content = digest(*(tensor for tensor in self.tensors if tensor is not None))
        return self.content

    def digest(self) -> str:
        return digest(self.digest_of_tensors(), *([] if self.members is None else [self.members]))


def sample_digest(sample: bytes) -> int:
    """Return a hash of a sample's inputs as a signed 64-bit integer."""
    return int.from_bytes(blake2b(sample, digest_size=8).digest(), "little", signed=True)
