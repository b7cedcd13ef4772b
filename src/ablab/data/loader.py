"""Data loaders that resume within an epoch."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ablab.data.batch import Batch, Split, Tensors
from ablab.data.rng import index_seeds
from ablab.data.sampler import BatchSampler


class Resumable:
    """A mixin for loaders that checks, when a run is resumed, that the batches will be the same.

    Lightning calls both methods and stores the state; it also stores the position within the epoch itself.
    """

    batching_settings: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the batches."""
        return self.batching_settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the settings that determine the batches have not changed.

        Raises:
            ValueError: a setting differs from the checkpoint's.
        """
        for name, now in self.batching_settings.items():
            if state.get(name) != now:
                raise ValueError(
                    f"{name}={now}: the checkpoint was written with {state.get(name)}, and other batches would follow; "
                    f"resume with {name}={state.get(name)}"
                )


class Loader(Resumable, DataLoader[Batch]):
    """A loader of whole batches of a split that starts at the current position of training.

    A resumed epoch continues after the last batch trained on. The position comes from Lightning's progress in the
    checkpoint, so batches prefetched by workers do not matter.

    Args:
        split: the samples.
        sampler: sampler of the indices of each batch; its seed also determines the samples' seeds.
        num_workers: number of worker processes.
        seeded: whether to add each sample's seed to the batches, for augmentation.
        position: returns the epoch, and the number of its completed batches.
    """

    def __init__(
        self,
        split: Split,
        sampler: BatchSampler,
        *,
        num_workers: int = 0,
        seeded: bool = False,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        # batch_size=None: the sampler yields the indices of a batch, and the split returns a batch
        dataset = SeededDataset(split, sampler.seed) if seeded else split
        super().__init__(
            SharedMemoryDataset(dataset) if num_workers else dataset,  # type: ignore[arg-type]
            sampler=EpochIndexSampler(sampler) if seeded else sampler,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # torch draws the worker seed; keep it off the global generator
        )
        if isinstance(split, Tensors) and not num_workers:
            sampler.device = split.device
        self.index_sampler = sampler
        self.position = position
        self.batching_settings = sampler.batching_settings
        self.is_shared_memory_full = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # As a generator, this runs at the first `next`, after Lightning has restored the position.
        self.index_sampler.epoch, self.index_sampler.start = self.position()
        if self.num_workers:
            try:
                batches = super().__iter__()
            except OSError as error:
                drop_traceback(error)
                raise RuntimeError(
                    f"DataLoader workers cannot be started ({error.strerror}): data.num_workers={self.num_workers}; "
                    "use fewer, or raise the limit: open files (ulimit -n), processes (ulimit -u), /dev/shm"
                ) from error
            yield from map(self.unpack, batches)
        else:  # skips the overhead of torch's iterator
            yield from map(self.dataset.__getitem__, self.sampler)

    def unpack(self, sent: Batch | bytes) -> Batch:
        """Unpack a batch from a worker, and warn once if it was sent through a pipe."""
        if not isinstance(sent, bytes):
            return sent
        if not self.is_shared_memory_full:
            self.is_shared_memory_full = True
            print(
                "warning: shared memory (/dev/shm) has no room for batches from workers, so they come through pipes, "
                "which is slower; use fewer data.num_workers, or allow more (docker run --shm-size=8g)",
                file=sys.stderr,
            )
        return Batch(*torch.load(io.BytesIO(sent), weights_only=True))


def drop_traceback(error: BaseException) -> None:
    """Drop an error's traceback silently: deleting half-started workers makes torch print an error on stderr."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook


class SharedMemoryDataset(Dataset[Batch | bytes]):
    """A split in a worker process that moves batches to shared memory, or serializes them to bytes if that is full.

    By default, torch moves batches to shared memory in a background thread of the worker. An error there is only
    printed, and the training process waits for the batch forever.
    """

    def __init__(self, split: Split | Dataset[Batch]) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitem__(self, item: Any) -> Batch | bytes:
        batch: Batch = self.split[item]
        try:
            for tensor in batch:
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError:  # the message depends on the cause
            file = io.BytesIO()
            torch.save(tuple(batch), file)
            return file.getvalue()
        return batch


class EpochIndexSampler(Sampler[Any]):
    """A sampler that adds the epoch to the indices of each batch, for use in worker processes."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, list[int] | Tensor]]:
        return ((self.sampler.epoch, indices) for indices in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class SeededDataset(Dataset[Batch]):
    """A split that adds seeds to its batches; indexed with (epoch, indices)."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: tuple[int, Sequence[int] | Tensor]) -> Batch:
        epoch, indices = item
        batch = self.split[indices]  # type: ignore[index]  # `Tensors` also accept tensors
        if isinstance(indices, Tensor):
            own = self.all_seeds.index_select(0, indices)
        else:
            own = index_seeds(self.seed, torch.tensor(indices)).to(batch.targets.device, non_blocking=True)
        return batch._replace(seeds=torch.stack([own, torch.full_like(own, epoch)], dim=1))

    @cached_property
    def all_seeds(self) -> Tensor:
        """The seeds of all samples on the device, so that a batch needs a single indexing operation."""
        assert isinstance(self.split, Tensors), "only samples are asked for by a tensor"
        return index_seeds(self.seed, torch.arange(len(self), device=self.split.device))
