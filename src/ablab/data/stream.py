"""Streaming of training images: read in order, shuffled in blocks and decoded on the fly."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ablab.data.batch import Batch, Samples
from ablab.data.loader import Resumable
from ablab.data.rng import index_seeds, make_generator
from ablab.digest import digest
from ablab.errors import RunError

PREFETCH = 2  # number of batches to prefetch
REMEDY = "resume with the original file in its place, or start a new run with the corrected data"
HEAD = 4096  # number of training images for the standardization


class Row(NamedTuple):
    """An encoded training sample: row number, bytes or file of the image, and class index."""

    number: int
    image: bytes | Path
    target: int


class ImageStream:
    """A streamed training split.

    Rows are shuffled within blocks of `block_size`, as a function of (seed, epoch, block). The order depends on the
    seed only, as for data in memory, and an epoch can start at any batch. Every process reads all rows, but decodes
    only its own.

    Args:
        rows: yields the rows from a given number on, in the order on disk.
        num_rows: number of rows.
        decode: decodes a row to an image `(C, H, W)`.
        block_size: number of rows per block.
        name: identifier of the content.
    """

    def __init__(
        self,
        rows: Callable[[int], Iterator[Row]],
        num_rows: int,
        decode: Callable[[Row], Tensor],
        *,
        block_size: int,
        name: str,
    ) -> None:
        self.rows = rows
        self.num_rows = num_rows
        self.decode = decode
        self.block_size = block_size
        self.name = name
        first = list(islice(rows(0), HEAD))
        self.shape = decode(first[0]).shape
        self.head = Samples(torch.stack([self.load(row) for row in first]), torch.tensor([row.target for row in first]))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """Return samples from the beginning of the stream (index modulo `HEAD`), for dry runs."""
        return self.head[[i % len(self.head) for i in indices]]

    def load(self, row: Row) -> Tensor:
        """Decode the image of a row.

        Raises:
            ValueError: the image cannot be decoded, or its size differs from that of the first image.
        """
        image = self.decode(row)
        if image.shape != self.shape:
            (height, width), first = image.shape[1:], self.shape[1:]
            raise ValueError(
                f"training row {row.number}: it has {height}x{width} pixels, and the first image "
                f"{first[0]}x{first[1]}; set data.image_size to bring all to one size"
            )
        return image

    def digest(self) -> str:
        return digest(self.name, self.num_rows)

    def shuffled_rows(self, seed: int, epoch: int, start: int) -> Iterator[Row]:
        """Yield the shuffled rows of an epoch, from position `start` on."""
        number, done = divmod(start, self.block_size)
        source = self.rows(number * self.block_size)
        while rows := list(islice(source, self.block_size)):
            for i in torch.randperm(len(rows), generator=make_generator(seed, epoch, number))[done:].tolist():
                yield rows[i]
            number, done = number + 1, 0


class StreamLoader(Resumable):
    """A loader of whole batches of a stream that starts at the current position of training.

    A row that cannot be read or decoded raises a `RunError` at the batch that needs it.

    Args:
        stream: the training split.
        batch_size: number of samples in a global batch, over all processes.
        seed: seed of the order, and of the samples' seeds.
        rank, world_size: rank of this process, and number of processes.
        num_threads: number of decoding threads.
        position: returns the epoch, and the number of its completed batches.
    """

    def __init__(
        self,
        stream: ImageStream,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 1,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_threads = num_threads
        self.position = position
        self.batching_settings = {"seed": seed, "batch_size": batch_size, "block_size": stream.block_size}

    def __len__(self) -> int:
        return len(self.stream) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.position()
        rows = self.stream.shuffled_rows(self.seed, epoch, start * self.batch_size)
        pending: deque[tuple[list[Row], list[Future[Tensor]]]] = deque()
        pool = ThreadPoolExecutor(self.num_threads)
        try:
            for number in range(start, len(self)):
                batch = self.read_rows(rows, number)[self.rank :: self.world_size]
                pending.append((batch, [pool.submit(self.stream.load, row) for row in batch]))
                if len(pending) > PREFETCH:
                    yield self.batch(epoch, *pending.popleft())
            while pending:
                yield self.batch(epoch, *pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def read_rows(self, rows: Iterator[Row], number: int) -> list[Row]:
        """Read the rows of a global batch."""
        try:
            found = list(islice(rows, self.batch_size))
        except Exception as error:  # the reading libraries raise many kinds of exceptions
            raise RunError(f"the training rows of batch {number} cannot be read ({error}); {REMEDY}") from error
        if len(found) < self.batch_size:
            raise RunError(
                f"the training part ends in batch {number} of {len(self)}: it has fewer rows than the "
                f"{len(self.stream)} that it had at first; {REMEDY}"
            )
        return found

    def batch(self, epoch: int, rows: list[Row], images: list[Future[Tensor]]) -> Batch:
        try:
            inputs = torch.stack([image.result() for image in images])
        except (OSError, ValueError) as error:
            raise RunError(f"{error}; {REMEDY}") from error
        own = index_seeds(self.seed, torch.tensor([row.number for row in rows]))
        return Batch(
            inputs,
            torch.tensor([row.target for row in rows]),
            seeds=torch.stack([own, torch.full_like(own, epoch)], dim=1),
        )
