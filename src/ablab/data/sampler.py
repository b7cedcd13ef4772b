"""Samplers of batch indices, determined by the seed and the epoch only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class BatchSampler(Sampler[list[int] | Tensor]):
    """A sampler of the indices of this process's part of each batch of an epoch.

    Samples are permuted as a function of (seed, epoch). A global batch is a slice of the permutation, and a process
    takes every `world_size`-th sample of the slice. Batches therefore do not depend on the number of workers or
    processes, and an epoch can start at any batch. An incomplete last training batch is dropped. Without `shuffle`,
    every sample occurs exactly once.

    Args:
        num_samples: number of samples in the split.
        batch_size: number of samples in a global batch, over all processes.
        shuffle: shuffle and drop the incomplete batch (training), or keep the order and all samples (evaluation).
        seed: seed of the permutations, with the epoch.
        rank, world_size: rank of this process, and number of processes.
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
        self.start = 0  # the batch to start at, above 0 in a resumed epoch
        self.device: torch.device | None = None  # device of the indices as tensors; None yields lists

    @property
    def batching_settings(self) -> dict[str, Any]:
        """Settings that determine the batches, besides the epoch."""
        return {"seed": self.seed, "batch_size": self.batch_size, "num_samples": self.num_samples}

    def permutation(self) -> Tensor:
        """Return the permuted sample indices of the epoch."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        return torch.randperm(self.num_samples, generator=self.generator())

    def generator(self) -> torch.Generator:
        """Return the random generator of the epoch."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def __iter__(self) -> Iterator[list[int] | Tensor]:
        order = self.permutation()
        if self.device is not None:  # one copy per epoch is cheaper than one per step
            order = order.to(self.device, non_blocking=True)
        for batch in range(self.start, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size]
            yield chosen.tolist() if self.device is None else chosen

    def __len__(self) -> int:
        """Return the number of batches in a complete epoch, even if `start` is above 0."""
        if self.shuffle:
            return self.num_samples // self.batch_size
        # the last batch counts only if it has a sample for this rank
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > self.rank)


class FewClassesSampler(BatchSampler):
    """A sampler of training batches with samples of at most `classes_per_batch` classes, which are not i.i.d.

    Such batches bias batch statistics. The samples of each class are permuted and cut into equal chunks, and a batch
    consists of `classes_per_batch` chunks. Chunks are arranged in rounds with one chunk of every class, so that a batch
    repeats a class only at the border of two rounds. Within a batch, the order is random. Left-over samples of a class
    are dropped in this epoch.

    Args:
        targets: class indices of the samples `(N)`.
        classes_per_batch: number of classes per batch; must divide `batch_size`.
        batch_size, seed, rank, world_size: see `BatchSampler`.

    Raises:
        ValueError: `classes_per_batch` exceeds the number of classes or does not divide the batch size, or a class has
            too few samples for a chunk.

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
    def batching_settings(self) -> dict[str, Any]:
        return {**super().batching_settings, "classes_per_batch": self.classes_per_batch}

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
