"""Base class of data sets: reading, fingerprint, data loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from ablab.data.batch import Batch, Kind, Split, Splits, Tensors
from ablab.data.loader import Loader, SeededDataset
from ablab.data.sampler import BatchSampler
from ablab.digest import digest

RESIDENT_SHARE = 0.2  # maximum fraction of free GPU memory for keeping a data set there


class DataModule(L.LightningDataModule, ABC):
    """Base class of data sets: reads the splits once, then yields whole batches.

    A subclass defines its `kind`, `read`, and the sizes that a model and a task need.

    Args:
        batch_size: samples per optimizer step, over all processes; "full" for the whole training split.
        micro_batch_size: maximum samples per forward pass in a process; larger batches are split, and the gradients of
            their parts accumulated. None never splits.
        val_fraction: fraction of the training samples held out for validation; 0 disables validation.
        folds, fold: number of cross-validation folds, and index of the fold to validate on instead of `val_fraction`;
            None for no cross-validation.
        split_seed: seed of the choice of validation samples.
        seed: seed of the order and augmentation of training samples.
        num_workers: number of worker processes; 0 is fastest for data in memory.

    Raises:
        ValueError: a value is out of range.
    """

    kind: ClassVar[Kind]
    extra_files: Sequence[Path] = ()  # files read that no setting names, set by `read`
    repeats_first_epoch = False  # repeat the batches of the first epoch in every epoch (trainer.overfit_batches)
    num_views = 0  # number of augmented views of each sample that the task requests (`Task.num_views`)
    scored: Literal["train", "val", "test"] = "test"  # the split to test on; ablab.lab.evaluate chooses another

    def __init__(
        self,
        *,
        batch_size: int | Literal["full"] = 32,
        micro_batch_size: int | None = None,
        val_fraction: float = 0.1,
        folds: int | None = None,
        fold: int = 0,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size != "full" and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: a batch has at least one sample")
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size}: a forward pass has at least one sample")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: use 0 to fetch batches in the main process, or more")
        for name, value in (("split_seed", split_seed), ("seed", seed)):
            if not 0 <= value < 2**32:
                raise ValueError(f"{name}={value}: a seed is 0 or more, and below {2**32}")
        if folds is None and fold != 0:
            raise ValueError(f"fold={fold}: say of how many, for example data.folds=5")
        if folds is not None and folds < 2:
            raise ValueError(f"folds={folds}: at least 2 are needed, or null for no cross-validation")
        if folds is not None and not 0 <= fold < folds:
            raise ValueError(f"fold={fold}: the {folds} folds have the numbers 0 to {folds - 1}")
        self.requested_batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.val_fraction = val_fraction
        self.folds = folds
        self.fold = fold
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.splits: Splits | None = None
        self.fingerprint = ""
        self.resident: dict[Tensor, Tensor] = {}  # tensors and their copies on the GPU

    @abstractmethod
    def read(self) -> Splits:
        """Read or generate the splits.

        They must not depend on batch sizes, `seed` or `num_workers`, since runs that differ only in these share them
        (see `ablab.data.reading`), and they are never modified.
        """

    @property
    @abstractmethod
    def model_sizes(self) -> dict[str, int]:
        """The sizes that a model needs, by the names of its constructor arguments."""

    @property
    @abstractmethod
    def task_sizes(self) -> dict[str, Any]:
        """The values that a task needs, by the names of its constructor arguments."""

    def training_class_counts(self) -> list[int] | None:
        """Return the number of training targets per class; None if unknown, or without classes."""
        return None

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the targets: classes, columns or tokens."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a sample's inputs, without the batch dimension."""
        with torch.device("cpu"):  # a dry run uses the meta device
            return tuple(self.first_samples(1).inputs.shape[1:])

    @property
    def augmented(self) -> bool:
        """Return whether training samples are augmented at random."""
        return False

    def apply_shift(self, splits: Splits) -> Splits:
        """Return the splits after a distribution shift; not part of the fingerprint."""
        return splits

    def setup(self, stage: str | None = None) -> None:
        if self.splits is None:
            splits = self.read()
            self.fingerprint = digest(splits.train.digest(), splits.val.digest(), splits.test.digest(), self.names())
            self.splits = self.apply_shift(replace(splits, test=getattr(splits, self.scored)))
        if len(self.splits.train) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(self.splits.train)} training samples; "
                "choose a smaller one, or full"
            )

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step, over all processes."""
        if self.requested_batch_size != "full":
            return self.requested_batch_size
        assert self.splits is not None, "call setup first"
        return len(self.splits.train)

    def forward_size(self, world_size: int) -> int:
        """Return the smallest number of samples in a forward pass of training, in one of `world_size` processes.

        Raises:
            ValueError: the batch size is not divisible by `world_size`.
        """
        if self.batch_size % world_size:
            full = self.requested_batch_size == "full"
            what = f"the {self.batch_size} training samples do" if full else "it is the global batch and does"
            nearest = self.batch_size // world_size * world_size
            raise ValueError(
                f"batch_size={self.requested_batch_size}: {what} not divide by {world_size} processes; choose "
                f"{nearest or world_size}, or another multiple of {world_size}"
            )
        share = self.batch_size // world_size
        return share if self.micro_batch_size is None else share // -(-share // self.micro_batch_size)

    def example(self, world_size: int) -> Batch:
        """Return a training batch as a model receives it in a forward pass in one of `world_size` processes.

        Raises:
            ValueError: the batch size is not divisible by `world_size`, or there are fewer evaluation samples.
        """
        assert self.splits is not None, "call setup first"
        for name, split in (("validation", self.splits.val), ("test", self.splits.test)):
            if len(split) < world_size and not (name == "validation" and len(split) == 0):
                raise ValueError(f"{len(split)} {name} samples cannot be shared by {world_size} processes; use fewer")
        self.forward_size(world_size)
        indices = list(range(self.batch_size // world_size))
        batch = self.on_after_batch_transfer(SeededDataset(self.splits.train, self.seed)[0, indices], 0)
        return batch.parts(self.micro_batch_size)[-1]  # the last part is the smallest

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if batch.targets.device == device:
            return batch
        return batch.on(device)

    def first_samples(self, number: int) -> Batch:
        """Return at most `number` training samples as a model receives them, without augmentation."""
        assert self.splits is not None, "call setup first"
        train = self.splits.train
        return self.on_after_batch_transfer(train[range(min(number, len(train)))], 0)

    def train_dataloader(self) -> Any:
        return self.loader("train")

    def val_dataloader(self) -> Loader | list[Any]:
        assert self.splits is not None, "call setup first"
        return self.loader("val") if len(self.splits.val) else []  # without loaders, Lightning skips the validation

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    def loader(self, name: Literal["train", "val", "test"]) -> Loader:
        split = self.on_device(name)
        rank, world_size = self.rank_and_world_size
        if name == "train":
            sampler = self.training_sampler(split, rank, world_size)
            return Loader(split, sampler, num_workers=self.num_workers, seeded=self.augmented, position=self.position)
        # evaluation batches must not need more memory than a forward pass of training
        size = min(self.batch_size, (self.micro_batch_size or self.batch_size) * world_size)
        sampler = BatchSampler(
            len(split), batch_size=size, shuffle=False, seed=self.seed, rank=rank, world_size=world_size
        )
        # evaluations use the views of epoch 0, so that they are all the same
        seeded = self.augmented and self.num_views > 0
        return Loader(split, sampler, num_workers=self.num_workers, seeded=seeded)

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        """Rank of this process, and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def training_sampler(self, split: Split, rank: int, world_size: int) -> BatchSampler:
        """Make the sampler of training batches."""
        return BatchSampler(
            len(split), batch_size=self.batch_size, shuffle=True, seed=self.seed, rank=rank, world_size=world_size
        )

    def position(self) -> tuple[int, int]:
        """Return the current epoch and the number of its completed batches, which is above 0 in a resumed epoch."""
        if self.trainer is None or not self.trainer.training:
            return 0, 0
        fit = self.trainer.fit_loop
        epoch: Any = fit.epoch_progress.current
        return 0 if self.repeats_first_epoch else epoch.processed, fit.epoch_loop.batch_progress.current.ready

    def on_device(self, name: str) -> Split:
        """Return a split, moved to the GPU if the data fit into a small part of its memory."""
        assert self.splits is not None, "call setup first"
        split: Split = getattr(self.splits, name)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type != "cuda" or self.num_workers or not isinstance(split, Tensors):
            return split
        if not self.resident:  # splits share tensors; copy each once
            parts = (part for part in vars(self.splits).values() if isinstance(part, Tensors))
            tensors = {tensor for part in parts for tensor in part.all if tensor is not None}
            free, _ = torch.cuda.mem_get_info(device)
            fits = sum(tensor.nbytes for tensor in tensors) < RESIDENT_SHARE * free
            self.resident = {tensor: tensor.to(device) if fits else tensor for tensor in tensors}
        return split.on(self.resident)

    def caveats(self) -> list[str]:
        """Return remarks on the splits that affect how results are to be read."""
        return [] if self.folds is None else [f"validated on fold {self.fold} of {self.folds}"]

    def record(self) -> dict[str, Any]:
        """Return the facts about the data that a run records in addition to the config."""
        assert self.splits is not None, "call setup first"
        return {"fingerprint": self.fingerprint, **{name: len(split) for name, split in vars(self.splits).items()}}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints."""
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint was trained on the same data.

        Raises:
            ValueError: the fingerprints differ.
        """
        if self.splits is not None and state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on other data (fingerprint {state['fingerprint'][:12]}) than these "
                f"({self.fingerprint[:12]}): a file, a split or a fold has changed; give the data of the run"
            )
