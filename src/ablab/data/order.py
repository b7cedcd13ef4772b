"""In which order samples come: decided by the seed and the epoch, and by nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class BatchOrder(Sampler[list[int] | Tensor]):
    """The indices of each batch of an epoch, as this process sees them.

    The order is a permutation that (seed, epoch) alone decide; a global batch is a slice of it, and a process takes
    every `world_size`-th sample of the slice. So neither workers nor the number of processes change what is learned
    from, and an epoch can be entered at any batch. A last training batch that would be short is dropped. Without
    `shuffle` every sample comes exactly once.

    Args:
        num_samples: the size of the split.
        batch_size: the samples of a global batch, over all processes.
        shuffle: permute and drop the short batch (training), or go through in order (evaluation).
        seed: decides the permutations, together with the epoch.
        rank, world_size: this process, of how many.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0  # the batch to begin at, in the middle of an epoch if need be
        self.device: torch.device | None = None  # a device to have the indices on, as tensors; None: lists of numbers

    @property
    def decides(self) -> dict[str, Any]:
        """What decides the batches, beside the epoch."""
        return {"seed": self.seed, "batch_size": self.batch_size, "num_samples": self.num_samples}

    def permutation(self) -> Tensor:
        """The samples of the epoch in their order."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=self.generator())

    def generator(self) -> torch.Generator:
        """Random numbers of this epoch."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def __iter__(self) -> Iterator[list[int] | Tensor]:
        order = self.permutation()
        if self.device is not None:  # all of an epoch's at once: a copy in each step would cost more than the samples
            order = order.to(self.device, non_blocking=True)
        for batch in range(self.start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            yield chosen.tolist() if self.device is None else chosen

    def __len__(self) -> int:
        """The batches of a whole epoch, wherever it is entered."""
        if self.shuffle:
            return self.num_samples // self.batch_size
        # in evaluation, a last batch that is too short to give this process a sample does not count
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > self.rank)


class FewClasses(BatchOrder):
    """Training batches that are no fair sample: each has samples of at most `classes_per_batch` classes.

    Each class's samples are permuted and cut into equal chunks; a batch is `classes_per_batch` of them. The chunks come
    in rounds that have one of every class, so a batch repeats a class only where two rounds meet; within a batch, the
    order is random. A class's samples that are left over wait for another epoch's permutation. It is what breaks
    statistics taken over a batch.

    Args:
        targets: the classes of the split's samples `(N)`.
        classes_per_batch: classes of a batch; it divides `batch_size`.

    Raises:
        ValueError: a number of classes that the data does not have or that does not divide the batch, or a class with
            too few samples for its share of a batch.

    References:
        Ioffe 2017, section 4.4 (batch norm on batches that are not independent), https://arxiv.org/abs/1702.03275
    """

    def __init__(
        self,
        targets: Tensor,
        *,
        classes_per_batch: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(targets), batch_size=batch_size, shuffle=True, seed=seed, rank=rank, world_size=world_size)
        classes = [(targets == label).nonzero().flatten() for label in targets.unique()]
        if not 1 <= classes_per_batch <= len(classes):
            raise ValueError(f"classes_per_batch={classes_per_batch}: from 1 to the {len(classes)} classes of the data")
        if batch_size % classes_per_batch:
            raise ValueError(
                f"classes_per_batch={classes_per_batch}: it does not divide batch_size={batch_size} into equal parts; "
                "choose numbers that do"
            )
        self.classes_per_batch = classes_per_batch
        self.chunk = batch_size // classes_per_batch
        self.classes = classes
        fewest = min(classes, key=len)
        if len(fewest) < self.chunk:
            raise ValueError(
                f"classes_per_batch={classes_per_batch}: class {int(targets[fewest[0]])} has {len(fewest)} training "
                f"samples, and a batch of {batch_size} takes {self.chunk} of a class; choose a smaller batch_size"
            )

    @property
    def decides(self) -> dict[str, Any]:
        return {**super().decides, "classes_per_batch": self.classes_per_batch}

    def permutation(self) -> Tensor:
        generator = self.generator()
        rounds: dict[int, list[Tensor]] = {}
        for members in self.classes:
            shuffled = members[torch.randperm(len(members), generator=generator)]
            for number in range(len(members) // self.chunk):
                chunk = shuffled[number * self.chunk : (number + 1) * self.chunk]
                rounds.setdefault(number, []).append(chunk)
        order = []
        for chunks in rounds.values():
            order += [chunks[i] for i in torch.randperm(len(chunks), generator=generator)]
        batches = torch.cat(order)[: len(self) * self.batch_size].view(len(self), self.batch_size)
        return torch.cat([batch[torch.randperm(self.batch_size, generator=generator)] for batch in batches])

    def __len__(self) -> int:
        return sum(len(members) // self.chunk for members in self.classes) * self.chunk // self.batch_size
