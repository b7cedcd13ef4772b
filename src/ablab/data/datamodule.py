"""What every data set shares: splits held in memory, whole batches in a seeded order, standardization on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Kind = Literal["images", "sequences", "text"]


class Batch(NamedTuple):
    """What a task is given: inputs, their targets and, for padded sequences, which steps are real.

    Shape:
        images: inputs `(N, C, H, W)`, targets `(N)`
        sequences: inputs `(N, L, features)`, targets `(N)`, valid `(N, L)`
        text: inputs `(N, L)`, targets `(N, L)` with -100 where there is nothing to predict
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; no sample is in two of them."""

    train: Dataset[Batch]
    val: Dataset[Batch]
    test: Dataset[Batch]


class TensorSplit(Dataset[Batch]):
    """Samples as tensors in memory; indexed by a list of numbers, it gives the whole batch at once."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        assert len(inputs) == len(targets)
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, indices: list[int]) -> Batch:
        return Batch(self.inputs[indices], self.targets[indices])


class BatchOrder(Sampler[list[int]]):
    """The indices of each batch of an epoch, as this process sees them.

    The order is a permutation that (seed, epoch) alone decide; a global batch is a slice of it, and a process takes
    every `world_size`-th sample of the slice. So neither workers nor the number of processes change what is learned
    from. A last training batch that would be short is dropped. Without `shuffle` every sample comes exactly once.

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

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.num_samples)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_samples, generator=generator)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size][self.rank :: self.world_size].tolist()

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_samples // self.batch_size
        # in evaluation, a last batch that is too short to give this process a sample does not count
        full, rest = divmod(self.num_samples, self.batch_size)
        return full + (rest > self.rank)


class DataModule(L.LightningDataModule, ABC):
    """A data set: reads its splits once, then hands out whole batches.

    A subclass says what it is: its `kind`, how to `read` it, and the sizes that a model and a task take from it.

    Args:
        batch_size: samples of a training step over all processes.
        seed: decides the order of the training samples.
        num_workers: processes that fetch batches; 0 is fastest for data in memory.
    """

    kind: ClassVar[Kind]

    def __init__(self, *, batch_size: int, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch has at least one sample")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: use 0 to fetch batches in the main process, or more")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.splits: Splits | None = None

    @abstractmethod
    def read(self) -> Splits:
        """Read, or make, the three splits."""

    @property
    @abstractmethod
    def model_sizes(self) -> dict[str, int]:
        """The sizes that a model takes from its data, by the names of its constructor's arguments."""

    @property
    @abstractmethod
    def task_sizes(self) -> dict[str, Any]:
        """What a task takes from its data, by the names of its constructor's arguments."""

    def setup(self, stage: str | None = None) -> None:
        if self.splits is None:
            self.splits = self.read()
            if len(self.splits.train) < self.batch_size:  # type: ignore[arg-type]
                raise ValueError(
                    f"batch_size={self.batch_size} is more than the {len(self.splits.train)} training samples; "  # type: ignore[arg-type]
                    "choose a smaller one"
                )

    def example(self, world_size: int) -> Batch:
        """The first training samples, as many as each of `world_size` processes has in a batch, as a model gets them.

        Raises:
            ValueError: the batch does not divide by the processes.
        """
        assert self.splits is not None, "call setup first"
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size={self.batch_size}: it is the global batch and does not divide by {world_size} processes; "
                f"choose a multiple of {world_size}"
            )
        return self.on_after_batch_transfer(self.splits.train[list(range(self.batch_size // world_size))], 0)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.loader("test", shuffle=False)

    def loader(self, split: Literal["train", "val", "test"], *, shuffle: bool) -> DataLoader[Batch]:
        assert self.splits is not None, "call setup first"
        samples: Dataset[Batch] = getattr(self.splits, split)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        order = BatchOrder(
            len(samples),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        # batch_size=None: the sampler's lists go to the split whole, which answers with whole batches
        return DataLoader(
            samples,
            sampler=order,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


class StandardizedData(DataModule):
    """Data of numbers with class labels: inputs leave the device as (x − mean) / std of the training split.

    A subclass's `read` calls `self.standardize(train)` with the training inputs.
    """

    class_names: list[str]
    mean: Tensor
    std: Tensor

    def standardize(self, train: Tensor, *, keep: tuple[int, ...] = ()) -> None:
        """Take mean and standard deviation over all dimensions but those in `keep`."""
        dims = [dim for dim in range(train.dim()) if dim not in keep]
        var, mean = torch.var_mean(train.double(), dims, correction=0, keepdim=True)
        self.mean, self.std = mean.float(), var.sqrt().clamp(min=1e-6).float()

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        inputs = (batch.inputs.float() - self.mean.to(batch.inputs.device)) / self.std.to(batch.inputs.device)
        return batch._replace(inputs=inputs)

    @property
    def task_sizes(self) -> dict[str, Any]:
        return {"class_names": self.class_names}


def stratified_holdout(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices in two, the classes in equal shares in both.

    Returns:
        The indices that stay, and those held out: `fraction` of all, at least one of each class.
    """
    import numpy as np
    from sklearn.model_selection import train_test_split

    classes, fewest = len(targets.unique()), int(targets.bincount().min())
    if not (0 < fraction < 1 and classes <= fraction * len(targets) <= len(targets) - classes) or fewest < 2:
        raise ValueError(
            f"val_fraction={fraction}: both parts of {len(targets)} samples need each of the {classes} classes; "
            "choose a fraction between 0 and 1 that leaves them, for example 0.1"
        )
    if seed < 0:
        raise ValueError(f"split_seed={seed}: a seed is 0 or more")
    kept, held_out = train_test_split(
        np.arange(len(targets)), test_size=fraction, stratify=targets.numpy(), random_state=seed
    )
    return torch.as_tensor(np.sort(kept)), torch.as_tensor(np.sort(held_out))
