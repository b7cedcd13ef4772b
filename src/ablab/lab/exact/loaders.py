"""Data loaders whose batches depend on the seed, the epoch and the position alone."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ablab.lab.exact.randomness import derive_seed, generator_states, restore_generators, seed_all

# torch's own samplers: their order depends on their generator alone.
PLAIN_SAMPLERS = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

Mode = Literal["max_size_cycle", "min_size", "max_size", "sequential"]


@dataclass
class LoaderContext:
    """The use of a loader in training.

    Args:
        position: returns the epoch and the number of batches trained on in it.
        rank, world_size: of this process.
        shards: each process takes its share of the samples, as with Lightning's distributed sampler.
        mode: how Lightning combines several training loaders.
    """

    position: Callable[[], tuple[int, int]]
    rank: int = 0
    world_size: int = 1
    shards: bool = False
    mode: Mode = "max_size_cycle"


class ResumableLoader:
    """A loader that returns the same batches for any number of workers, and resumes in the middle of an epoch.

    The order of an epoch comes from the loader's own sampler, after seeding its generator and the global generators
    from (seed, name, epoch). Before a batch is fetched, the global generators of the fetching process are seeded from
    (seed, name, epoch, batch number, rank), so random augmentation depends on the batch, not on the worker. Loaders
    without random access (iterable data sets, loaders of other libraries) are read again and skipped up to the
    position.

    Args:
        loader: a `DataLoader`, or any iterable of batches.
        seed: of the order, and of random numbers drawn while fetching.
        name: distinguishes the loaders of a run.
        context: where the loader is used.
    """

    def __init__(self, loader: Any, *, seed: int, name: str, context: LoaderContext) -> None:
        self.loader = loader
        self.seed = seed
        self.name = name
        self.context = context
        self.entered: int | None = None  # the epoch of the last pass
        self.cycle = 0  # passes over a short loader that is repeated within an epoch
        self.drawn: int | None = None  # the epoch whose order was drawn last
        self.first: tuple[Any, str] | None = None  # the first batch's item and digest, until an epoch is over
        self.recent: deque[tuple[int, Any, list[int]]] = deque(maxlen=2)  # number, batch and its tensors' versions
        self.expected: str | None = None  # digest of the last batch before a resume
        self.seeks = is_seekable(loader)
        self.item_sampler = IteratorSampler()
        self.stream: Iterator[Any] | None = None  # of the current pass
        self.seeded_loader = self.make_seeded_loader() if self.seeks else loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # missing during unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        if not (self.seeks and self.context.shards):
            return len(self.loader)
        if self.shares_batches:
            return -(-len(self.loader.batch_sampler) // self.context.world_size)
        samples = -(-len(self.sampler) // self.context.world_size)
        if self.loader.batch_sampler is None:
            return samples
        return samples // self.loader.batch_size if self.loader.drop_last else -(-samples // self.loader.batch_size)

    @property
    def shares_batches(self) -> bool:
        """True if processes take turns in whole batches, because a custom batch sampler forms them."""
        sampler = self.loader.batch_sampler
        return sampler is not None and (type(sampler) is not BatchSampler or self.loader.batch_size is None)

    def state_dict(self) -> dict[str, Any]:
        """Return no state, since Lightning keeps the position; having this method marks the loader as resumable."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing, see `state_dict`."""

    # Iteration ----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        # This is a generator: it starts when the first batch is requested, after Lightning has restored the position of
        # a resumed run.
        epoch, start = self.context.position()
        if self.entered == epoch and self.is_training:
            self.cycle, start = self.cycle + 1, 0
        else:
            self.cycle = 0
        self.entered = epoch
        if start and self.context.mode == "max_size_cycle" and (length := self.length()):
            self.cycle, start = divmod(start, length)
        batches = self.seek(epoch, start) if self.seeks else self.skip(epoch, start)
        for number, batch in batches:
            if self.is_training:
                self.recent.append((number, batch, [t._version for t in tensors_of(batch)]))
            yield batch

    @property
    def is_training(self) -> bool:
        return self.name.startswith("train")

    def length(self) -> int | None:
        """Return the number of batches, or None if the loader does not know it."""
        try:
            return len(self)
        except (TypeError, NotImplementedError):
            return None

    def key(self, epoch: int, number: int) -> tuple[Any, ...]:
        return (self.seed, self.name, epoch, self.cycle, number, self.context.rank)

    def seek(self, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
        """Yield the batches from `start` on, with their numbers."""
        order = self.order(epoch)
        keyed = ((derive_seed(*self.key(epoch, i)), epoch, indices) for i, indices in enumerate(order))
        if start and self.expected is not None:
            before = next(islice(keyed, start - 1, None), None)
            self.verify(None if before is None else self.fetch(before)[0])
        else:
            next(islice(keyed, start, start), None)
        self.item_sampler.items = keyed
        self.stream = iter(self.seeded_loader)
        yield from enumerate(self.stream, start)

    def skip(self, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
        """Read from the beginning, and yield the batches from `start` on."""
        repeats, left, done = self.context.mode == "max_size_cycle" and self.is_training, start, 0
        while True:
            loader = self.restarted(epoch)
            seed_all(self.seed, self.name, epoch, self.cycle)  # samplers may draw as soon as iteration begins
            stream = self.stream = iter(loader)
            is_empty = True
            for i in count():
                seed_all(*self.key(epoch, i))
                try:
                    batch = next(stream)
                except StopIteration:
                    break
                is_empty = False
                if left:
                    left, done = left - 1, done + 1
                    if not left:
                        self.verify(batch)
                    continue
                yield done, batch
                done += 1
            if not (left and repeats) or is_empty:
                return
            self.cycle += 1  # training had exhausted a short loader by then, and started it again

    def restarted(self, epoch: int) -> Any:
        """Return the loader with its workers seeded for this epoch."""
        if not isinstance(self.loader, DataLoader):
            return self.loader
        loader = self.loader
        if loader.persistent_workers:  # persistent workers would continue the random numbers of the previous epoch
            if type(loader) is DataLoader and isinstance(loader.dataset, IterableDataset):
                loader = rebuild_loader(loader, persistent_workers=False)
            else:
                self.close()
                loader._iterator = None
        for holder in (loader, loader.dataset):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        loader.generator = torch.Generator().manual_seed(
            derive_seed(self.seed, self.name, epoch, self.cycle, "workers", self.context.rank)
        )
        return loader

    def order(self, epoch: int) -> Iterator[Any]:
        """Return the indices of each batch of an epoch for this process."""
        if self.drawn is None and not self.is_plain:
            for earlier in range(epoch):  # a sampler may keep state from epoch to epoch
                self.draw(earlier)
        self.drawn = epoch
        order = self.draw(epoch)
        if not self.context.shards:
            return iter(order)
        size = -(-len(order) // self.context.world_size) * self.context.world_size
        # like Lightning, repeat samples until all processes have equally many
        repeated = order * (size // max(len(order), 1) + 1)
        share = repeated[:size][self.context.rank :: self.context.world_size]
        if self.loader.batch_sampler is None or self.shares_batches:
            return iter(share)
        return iter(BatchSampler(share, self.loader.batch_size, self.loader.drop_last))

    @property
    def innermost(self) -> Any:
        """The sampler of single samples, possibly inside a batch sampler."""
        return getattr(self.loader.batch_sampler, "sampler", self.sampler)

    @property
    def is_plain(self) -> bool:
        """True if the seeded generators alone determine the order of an epoch."""
        return type(self.loader.batch_sampler) in (BatchSampler, type(None)) and type(self.innermost) in PLAIN_SAMPLERS

    def draw(self, epoch: int) -> list[Any]:
        """Return the order of the loader's sampler for an epoch, the same in every process."""
        batch_sampler, sampler = self.loader.batch_sampler, self.sampler
        for holder in samplers_of(self.loader):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
            if isinstance(getattr(holder, "generator", None), torch.Generator):
                holder.generator.manual_seed(derive_seed(self.seed, self.name, epoch, self.cycle, "sampler"))
        whole = batch_sampler is not None and (self.shares_batches or not self.context.shards)
        source = batch_sampler if whole else sampler
        states = generator_states()
        seed_all(self.seed, self.name, epoch, self.cycle)
        try:
            return list(islice(source, len(source)))
        finally:
            restore_generators(states)

    def make_seeded_loader(self) -> DataLoader[Any]:
        """Return a loader with the same samples and workers, which receives indices together with seeds."""
        loader = self.loader
        dataset = SeededBatches(loader.dataset, loader.collate_fn, is_batch=loader.batch_sampler is not None)
        settings: dict[str, Any] = {}
        if loader.num_workers:
            settings = {
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
                "multiprocessing_context": loader.multiprocessing_context,
            }
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=self.item_sampler,
            num_workers=loader.num_workers,
            collate_fn=identity,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator().manual_seed(derive_seed(self.seed, self.name, "workers")),
            **settings,
        )

    def close(self) -> None:
        """Shut down the workers: garbage collection would wait five seconds for each."""
        for stream in (self.stream, getattr(self.seeded_loader, "_iterator", None)):
            getattr(stream, "_shutdown_workers", lambda: None)()
        self.stream = None

    # Verification -------------------------------------------------------------------------------------------------

    def digest_before(self, position: int) -> str | None:
        """Return a hash of the batch before a position; None if it is no longer available, or training modified it."""
        number = position - 1
        if self.context.mode == "max_size_cycle" and self.seeks and (length := self.length()):
            number %= length
        for i, batch, versions in self.recent:
            if i == number and versions == [t._version for t in tensors_of(batch)]:
                return digest_of(batch)
        return None

    def verify(self, batch: Any) -> None:
        """Warn if the batch before the resume differs from the one that was trained on."""
        expected, self.expected = self.expected, None
        if expected is not None and digest_of(batch) != expected:
            print_warning(
                f"{self.name}: after the resume the data give other batches than before, so the run does not end with "
                "the same bits; " + REMEDY
            )

    def fetch(self, *items: Any) -> list[Any]:
        """Fetch batches outside of training, in a worker if the loader has some: a data set may open files there."""
        if self.loader.num_workers == 0:
            return [self.seeded_loader.dataset[item] for item in items]
        loader = DataLoader(
            self.seeded_loader.dataset,
            batch_size=None,
            sampler=items,
            num_workers=1,
            collate_fn=identity,
            worker_init_fn=self.loader.worker_init_fn,
            multiprocessing_context=self.loader.multiprocessing_context,
            generator=torch.Generator(),
        )
        return list(loader)

    def check_reproducible(self) -> str | None:
        """Fetch the first batch twice; return why a resumed run would get other batches, or None."""
        if not self.seeks or not self.length():
            return None
        item = (derive_seed(*self.key(0, 0)), 0, next(self.order(0)))
        self.drawn = None
        digest, again = map(digest_of, self.fetch(item, item))
        if again != digest:
            return f"{type(self.loader.dataset).__name__} gives other values each time it is read; {REMEDY}"
        self.first = (item, digest)
        return None

    def check_unchanged(self) -> str | None:
        """Fetch the first batch again after an epoch; return why it differs, or None."""
        if self.first is None:
            return None
        (item, digest), self.first = self.first, None
        if digest_of(self.fetch(item)[0]) == digest:
            return None
        return (
            f"{type(self.loader.dataset).__name__} has changed in the first epoch; save what changes in the data "
            "module's state_dict, and restore it in load_state_dict"
        )


REMEDY = "draw from the global generators of torch, numpy or random, which are seeded for each batch"


def print_warning(text: str) -> None:
    """Print a warning on the standard error of the first process."""
    rank_zero_only(print)(f"warning: {text}", file=sys.stderr)


def is_seekable(loader: Any) -> bool:
    """Return whether batches can be fetched by index from a map-style data set with torch's own loader code."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    kind = type(loader)
    is_torchs = kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator
    try:
        return is_torchs and len(loader) >= 0
    except TypeError:  # a sampler without a length may be infinite
        return False


def samplers_of(loader: Any) -> list[Any]:
    """Return the nested samplers of a loader."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]


def rebuild_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Return a loader of the same data set with some settings changed."""
    settings = {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    return DataLoader(loader.dataset, **{**settings, **changes})


class IteratorSampler(Sampler[Any]):
    """A sampler over an iterator that is replaced for each pass."""

    def __init__(self) -> None:
        self.items: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.items


class SeededBatches(Dataset[Any]):
    """Whole batches of a data set, each fetched after seeding the global generators for it.

    Args:
        dataset: a map-style data set.
        collate: collates samples into a batch, or converts one sample if `is_batch` is false.
        is_batch: indices come as lists.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], *, is_batch: bool) -> None:
        self.dataset = dataset
        self.collate = collate
        self.is_batch = is_batch
        self.epoch: int | None = None

    def __getitem__(self, item: tuple[int, int, Any]) -> Any:
        seed, epoch, indices = item
        if epoch != self.epoch and hasattr(self.dataset, "set_epoch"):  # each worker has a copy
            self.dataset.set_epoch(epoch)
        self.epoch = epoch
        seed_all(seed)
        if not self.is_batch:
            return self.collate(self.dataset[indices])
        if hasattr(self.dataset, "__getitems__") and self.dataset.__getitems__:
            return self.collate(self.dataset.__getitems__(indices))
        return self.collate([self.dataset[i] for i in indices])


def identity(batch: Any) -> Any:
    return batch


# Batches --------------------------------------------------------------------------------------------------------------


def iter_leaves(batch: Any, visited: dict[int, tuple[int, Any]] | None = None) -> Iterator[Any]:
    """Yield the leaves of a nested batch; unknown objects are traversed by their attributes.

    Args:
        batch: of any type.
        visited: the objects traversed so far, with their numbers; repeated objects yield their number.
    """
    if batch is None or isinstance(batch, Tensor | str | bytes | bool | int | float):
        yield batch
        return
    visited = {} if visited is None else visited
    if id(batch) in visited:
        yield visited[id(batch)][0]
        return
    visited[id(batch)] = (len(visited), batch)  # kept alive, so that no other object gets the same id
    if isinstance(batch, type):
        yield batch.__qualname__
    elif isinstance(batch, np.ndarray) and batch.dtype.hasobject:
        yield batch.shape
        yield from iter_leaves(batch.tolist(), visited)
    elif isinstance(batch, np.ndarray):
        yield batch
    elif isinstance(batch, Mapping):
        for key in batch:
            yield key
            yield from iter_leaves(batch[key], visited)
    elif isinstance(batch, set | frozenset):
        yield from sorted(map(digest_of, batch))  # their order differs between processes
    elif isinstance(batch, Sequence):
        yield len(batch)
        for part in batch:
            yield from iter_leaves(part, visited)
    elif hasattr(batch, "__array__") or hasattr(batch, "__array_interface__"):  # images, data frames
        yield type(batch).__qualname__
        yield from iter_leaves(np.asarray(batch), visited)
    elif hasattr(batch, "__dict__") or type(batch).__repr__ is object.__repr__:  # the default repr is a memory address
        yield type(batch).__qualname__
        for key, value in instance_attributes(batch).items():
            yield key
            yield from iter_leaves(value, visited)
    else:
        yield batch


def instance_attributes(thing: Any) -> dict[str, Any]:
    """Return an object's attributes, including those in slots."""
    slots = [name for kind in type(thing).__mro__ for name in np.atleast_1d(vars(kind).get("__slots__", ()))]
    names = [name for name in map(str, slots) if name not in ("__dict__", "__weakref__") and hasattr(thing, name)]
    return {**{name: getattr(thing, name) for name in names}, **getattr(thing, "__dict__", {})}


def tensors_of(batch: Any) -> list[Tensor]:
    return [leaf for leaf in iter_leaves(batch) if isinstance(leaf, Tensor)]


def digest_of(batch: Any) -> str:
    """Return a hash of everything in a batch."""
    found = blake2b(digest_size=16)
    for leaf in iter_leaves(batch):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, np.ndarray):
            found.update(f"{leaf.dtype} {leaf.shape}".encode())
            found.update(np.ascontiguousarray(leaf).tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()
