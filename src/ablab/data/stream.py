"""Training images that are too many to keep decoded: read in order, shuffled in blocks, decoded as they are used."""

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
from ablab.data.draws import generator, own_seeds
from ablab.data.loader import Resumable
from ablab.digest import digest
from ablab.errors import RunError

AHEAD = 2  # batches that are decoded while one is learned from
REMEDY = "resume with the original file in its place, or start a new run with the corrected data"
HEAD = 4096  # training images that the standardization is taken from


class Row(NamedTuple):
    """A training sample that is not decoded: its number in the stream, its bytes (or its file) and its class."""

    number: int
    image: bytes | Path
    target: int


class ImageStream:
    """A training split that is streamed.

    The rows come in blocks of `block_size`, each permuted by (seed, epoch, block): the order is decided by the seed, as
    that of data in memory is, and it can be entered at any batch. Every process reads all rows and decodes its own.

    Args:
        rows: gives the rows from a number on, in their order on disk.
        num_rows: how many there are.
        decode: from a row's bytes to an image `(C, H, W)`.
        block_size: rows of a block.
        name: identifies the content.
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
        """The first samples, over and over, to try a model with; those further on can only be streamed."""
        return self.head[[i % len(self.head) for i in indices]]

    def load(self, row: Row) -> Tensor:
        """Decode a row.

        Raises:
            ValueError: its image cannot be decoded or has another size than the first one, or its label is wrong.
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

    def order(self, seed: int, epoch: int, start: int) -> Iterator[Row]:
        """The rows of an epoch as they are learned from, beginning with the one numbered `start` in that order."""
        number, done = divmod(start, self.block_size)
        source = self.rows(number * self.block_size)
        while rows := list(islice(source, self.block_size)):
            for i in torch.randperm(len(rows), generator=generator(seed, epoch, number))[done:].tolist():
                yield rows[i]
            number, done = number + 1, 0


class StreamLoader(Resumable):
    """Whole batches of a stream, from the batch where training stands.

    A row that cannot be read or decoded ends the run at the batch that needs it, with a `RunError`.

    Args:
        stream: the training split.
        batch_size: samples of a global batch.
        seed: decides the order, and gives samples their seeds.
        rank, world_size: this process, of how many.
        num_threads: threads that decode.
        position: the epoch, and the number of its batches that training has seen.
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
        self.decides = {"seed": seed, "batch_size": batch_size, "block_size": stream.block_size}

    def __len__(self) -> int:
        return len(self.stream) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        epoch, start = self.position()
        rows = self.stream.order(self.seed, epoch, start * self.batch_size)
        pending: deque[tuple[list[Row], list[Future[Tensor]]]] = deque()
        pool = ThreadPoolExecutor(self.num_threads)
        try:
            for number in range(start, len(self)):
                batch = self.read(rows, number)[self.rank :: self.world_size]
                pending.append((batch, [pool.submit(self.stream.load, row) for row in batch]))
                if len(pending) > AHEAD:
                    yield self.batch(epoch, *pending.popleft())
            while pending:
                yield self.batch(epoch, *pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, rows: Iterator[Row], number: int) -> list[Row]:
        """Take the rows of a global batch."""
        try:
            found = list(islice(rows, self.batch_size))
        except Exception as error:  # a library reads the files, and raises whatever its parts raise
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
        own = own_seeds(self.seed, torch.tensor([row.number for row in rows]))
        return Batch(
            inputs,
            torch.tensor([row.target for row in rows]),
            seeds=torch.stack([own, torch.full_like(own, epoch)], dim=1),
        )
