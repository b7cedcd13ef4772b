"""What passes from data to a task: batches, and the splits that they are taken from."""

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

IGNORED_PIXEL = 255  # in a mask: a pixel that neither loss nor metrics count, as in PASCAL VOC and Cityscapes


class Batch(NamedTuple):
    """What a task is given: inputs, their targets and, where there are any, what else belongs to each sample.

    Shape:
        images: inputs `(N, C, H, W)`, targets `(N)`
        masks: inputs `(N, C, H, W)`, targets `(N, H, W)` of classes, with 255 where nothing counts
        sequences: inputs `(N, L, features)`, targets `(N)`, valid `(N, L)`: which steps are real
        vectors: inputs `(N, F)`, targets `(N)` of classes, or `(N, K)` of labels or numbers
        text: inputs `(N, L)`, targets `(N, L)` with -100 where there is nothing to predict
        seeds `(N, 2)`: of a training sample, its own and the epoch; see `ablab.data.draws`
        mixed `(N, num_classes)`: each class's share of a sample that is mixed of two
        views `(N, num_views, C, H, W)`: augmented, if the task asks for them; `inputs` are then not augmented
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor | None = None
    seeds: Tensor | None = None
    mixed: Tensor | None = None
    views: Tensor | None = None

    def on(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return Batch(*(None if t is None else t.to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]

    def parts(self, largest: int | None) -> list[Batch]:
        """The batch in as few parts as possible, none of more than `largest` samples; their sizes differ by one."""
        count = 1 if largest is None else -(-len(self.targets) // largest)
        if count == 1:
            return [self]
        pieces = [[None] * count if field is None else field.tensor_split(count) for field in self]
        return [Batch(*fields) for fields in zip(*pieces, strict=True)]


class Split(Protocol):
    """A part of a data set: asked with a list of numbers, it answers with the whole batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int]) -> Batch: ...

    def digest(self) -> str:
        """A hash of everything in it."""


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; no sample is in two of them."""

    train: Split
    val: Split
    test: Split


class Tensors(Dataset[Batch], ABC):
    """A split that is tensors, and can be moved to an accelerator; it is asked with a tensor of numbers too."""

    @property
    @abstractmethod
    def all(self) -> Sequence[Tensor | None]:
        """What it consists of."""

    @abstractmethod
    def on(self, copies: dict[Tensor, Tensor]) -> Self:
        """The same split with other copies of its tensors, on a device."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(tensor.device for tensor in self.all if tensor is not None)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, indices: Sequence[int] | Tensor) -> Batch: ...

    @abstractmethod
    def digest(self) -> str:
        """A hash of everything in it."""


class Samples(Tensors):
    """Samples as tensors, in memory or in a mapped file.

    Args:
        inputs, targets, valid: the tensors; the first dimension counts samples.
        members: the numbers of those samples that belong to this split; None is all.
        content: a hash of the tensors, where one is known already.
        digests: a hash of each sample's inputs `(N)`, see `sample_digest`, where they are known already.
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
        # index_select copies rows; indexing with brackets takes twenty times as long
        return Batch(*(None if t is None else t.index_select(0, chosen) for t in self.tensors))  # type: ignore[arg-type]

    @property
    def targets(self) -> Tensor:
        """The targets of the split's own samples `(N)`."""
        return self.tensors.targets if self.members is None else self.tensors.targets[self.members]

    @property
    def digests(self) -> Tensor:
        """A hash of the inputs of each of the split's own samples `(N)`, and of their `valid` steps."""
        if self.known_digests is None:
            parts = [tensor.cpu().numpy() for tensor in (self.tensors.inputs, self.tensors.valid) if tensor is not None]
            rows = (b"".join(part[row].tobytes() for part in parts) for row in range(len(parts[0])))
            self.known_digests = torch.tensor([sample_digest(row) for row in rows], dtype=torch.int64)
        return self.known_digests if self.members is None else self.known_digests[self.members]

    def whole(self) -> Batch:
        """All samples of the split as one batch."""
        return self.tensors if self.members is None else self[range(len(self))]

    def part(self, members: Tensor) -> Samples:
        """Some of the samples; the tensors are shared, not copied."""
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
    """Return a hash of a sample's inputs, a signed number of 64 bits."""
    return int.from_bytes(blake2b(sample, digest_size=8).digest(), "little", signed=True)
