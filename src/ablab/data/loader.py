"""From an order to batches: a loader that begins where the run is."""

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
from ablab.data.draws import own_seeds
from ablab.data.order import BatchOrder


class Resumable:
    """A loader that a resumed run can trust: a checkpoint holds what decides its batches.

    Lightning asks for the two methods and stores what they give; the position within the epoch is its own.
    """

    decides: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches."""
        return self.decides

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with other batches.

        Raises:
            ValueError: the checkpoint's run drew its batches in another way.
        """
        for name, now in self.decides.items():
            if state.get(name) != now:
                raise ValueError(
                    f"{name}={now}: the checkpoint was written with {state.get(name)}, and other batches would follow; "
                    f"resume with {name}={state.get(name)}"
                )


class Loader(Resumable, DataLoader[Batch]):
    """Whole batches of a split, in an order, from the batch where training stands.

    A resumed epoch goes on with the batch after the last one learned from. The position is Lightning's own, from the
    checkpoint; workers that had fetched ahead do not matter.

    Args:
        split: where the samples are.
        order: which of them make up each batch; its seed also gives samples theirs.
        num_workers: processes that fetch batches.
        seeded: the batches carry each sample's seed, for what is drawn for it.
        position: the epoch, and the number of its batches that training has seen.
    """

    def __init__(
        self,
        split: Split,
        order: BatchOrder,
        *,
        num_workers: int = 0,
        seeded: bool = False,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        # batch_size=None: what the sampler gives goes to the split whole, which answers with a whole batch
        dataset = Seeded(split, order.seed) if seeded else split
        super().__init__(
            Sent(dataset) if num_workers else dataset,  # type: ignore[arg-type]
            sampler=InEpoch(order) if seeded else order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # torch draws a seed for workers; from the global one, it would move dropout's
        )
        if isinstance(split, Tensors) and not num_workers:
            order.device = split.device
        self.order = order
        self.position = position
        self.decides = order.decides
        self.is_short = False  # of shared memory

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: it runs at the first `next`, and by then Lightning has restored where the run is.
        self.order.epoch, self.order.start = self.position()
        if self.num_workers:
            try:
                batches = super().__iter__()
            except OSError as error:
                forget(error)
                raise RuntimeError(
                    f"DataLoader workers cannot be started ({error.strerror}): data.num_workers={self.num_workers}; "
                    "use fewer, or raise the limit: open files (ulimit -n), processes (ulimit -u), /dev/shm"
                ) from error
            yield from map(self.received, batches)
        else:  # torch's own way collates, and counts, what is a whole batch already
            yield from map(self.dataset.__getitem__, self.sampler)

    def received(self, sent: Batch | bytes) -> Batch:
        """A worker's batch, whichever way it came."""
        if not isinstance(sent, bytes):
            return sent
        if not self.is_short:
            self.is_short = True
            print(
                "warning: shared memory (/dev/shm) has no room for batches from workers, so they come through pipes, "
                "which is slower; use fewer data.num_workers, or allow more (docker run --shm-size=8g)",
                file=sys.stderr,
            )
        return Batch(*torch.load(io.BytesIO(sent), weights_only=True))


def forget(error: BaseException) -> None:
    """Drop what an error's traceback holds: torch complains, on stderr, when it ends workers that never began."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        error.__traceback__ = None
    finally:
        sys.unraisablehook = hook


class Sent(Dataset[Batch | bytes]):
    """A split in a worker, whose batches go to the training process through shared memory, or as bytes if that is full.

    torch moves a batch to shared memory in a thread of the worker's queue. An error there is printed and forgotten, and
    the training process waits for the batch forever.
    """

    def __init__(self, split: Split | Dataset[Batch]) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)  # type: ignore[arg-type]

    def __getitem__(self, drawn: Any) -> Batch | bytes:
        batch: Batch = self.split[drawn]
        try:
            for tensor in batch:
                if tensor is not None:
                    tensor.share_memory_()
        except RuntimeError:  # torch has several texts for it
            file = io.BytesIO()
            torch.save(tuple(batch), file)
            return file.getvalue()
        return batch


class InEpoch(Sampler[Any]):
    """An order's batches, each with its epoch: workers cannot know it otherwise."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[tuple[int, list[int] | Tensor]]:
        return ((self.order.epoch, indices) for indices in self.order)

    def __len__(self) -> int:
        return len(self.order)


class Seeded(Dataset[Batch]):
    """A training split whose batches carry each sample's seed."""

    def __init__(self, split: Split, seed: int) -> None:
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, drawn: tuple[int, Sequence[int] | Tensor]) -> Batch:
        epoch, indices = drawn
        batch = self.split[indices]  # type: ignore[index]  # samples take a tensor too
        if isinstance(indices, Tensor):
            own = self.all_seeds.index_select(0, indices)
        else:
            own = own_seeds(self.seed, torch.tensor(indices)).to(batch.targets.device, non_blocking=True)
        return batch._replace(seeds=torch.stack([own, torch.full_like(own, epoch)], dim=1))

    @cached_property
    def all_seeds(self) -> Tensor:
        """Every sample's own seed, where the samples are: picked from there, they take one operation a step."""
        assert isinstance(self.split, Tensors), "only samples are asked for by a tensor"
        return own_seeds(self.seed, torch.arange(len(self), device=self.split.device))
