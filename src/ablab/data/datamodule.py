"""What every data set shares: it is read once, fingerprinted, and handed out in whole batches."""

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
from ablab.data.loader import Loader, Seeded
from ablab.data.order import BatchOrder
from ablab.digest import digest

RESIDENT_SHARE = 0.2  # of an accelerator's free memory that a data set may take


class DataModule(L.LightningDataModule, ABC):
    """A data set: reads its splits once, then hands out whole batches.

    A subclass says what it is: its `kind`, how to `read` it, and the sizes that a model and a task take from it.

    Args:
        batch_size: samples of a step of the optimizer, over all processes; "full" is the whole training split.
        micro_batch_size: most samples of a forward pass in one process; more are taken one part after another, and
            their gradients added up. None takes them all at once.
        val_fraction: held out of the training samples for validation; 0 trains on all and validates never.
        folds, fold: cross-validation: the validation part is the one numbered `fold` of so many disjoint ones that
            cover the training samples; val_fraction then does not matter. None is no cross-validation.
        split_seed: decides which samples are held out.
        seed: decides the order of the training samples, and their augmentation.
        num_workers: processes that fetch batches; 0 is fastest for data in memory.

    Raises:
        ValueError: a value that makes no sense.
    """

    kind: ClassVar[Kind]
    outside: Sequence[Path] = ()  # files that were read and that no setting names, set by `read`
    repeats_first_epoch = False  # every epoch has the batches of the first one (trainer.overfit_batches)
    num_views = 0  # augmented views of each sample beside its inputs, as the task asks for (`Task.num_views`)
    scored: Literal["train", "val", "test"] = "test"  # the split that a test is of; ablab.lab.evaluate chooses another

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
        self.asked_batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.val_fraction = val_fraction
        self.folds = folds
        self.fold = fold
        self.split_seed = split_seed
        self.seed = seed
        self.num_workers = num_workers
        self.splits: Splits | None = None
        self.fingerprint = ""
        self.resident: dict[Tensor, Tensor] = {}  # tensors, and their copies on an accelerator

    @abstractmethod
    def read(self) -> Splits:
        """Read, or make, the three splits.

        They do not depend on batch sizes, workers or the order's seed: runs that differ in these share them, see
        `ablab.data.reading`. Nobody writes to what is read.
        """

    @property
    @abstractmethod
    def model_sizes(self) -> dict[str, int]:
        """The sizes that a model takes from its data, by the names of its constructor's arguments."""

    @property
    @abstractmethod
    def task_sizes(self) -> dict[str, Any]:
        """What a task takes from its data, by the names of its constructor's arguments."""

    def training_class_counts(self) -> list[int] | None:
        """Return how many training targets each class has; None where that is not known, or there are no classes."""
        return None

    @abstractmethod
    def names(self) -> list[str]:
        """What the numbers of the targets stand for: classes, or tokens."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a sample's inputs, without the batch dimension."""
        with torch.device("cpu"):  # a dry run asks on the meta device
            return tuple(self.first(1).inputs.shape[1:])

    @property
    def augmented(self) -> bool:
        """Whether something is drawn at random for each training sample."""
        return False

    def changed(self, splits: Splits) -> Splits:
        """The splits after what is done to them on purpose; the fingerprint is of those before."""
        return splits

    def setup(self, stage: str | None = None) -> None:
        if self.splits is None:
            splits = self.read()
            self.fingerprint = digest(splits.train.digest(), splits.val.digest(), splits.test.digest(), self.names())
            self.splits = self.changed(replace(splits, test=getattr(splits, self.scored)))
        if len(self.splits.train) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(self.splits.train)} training samples; "
                "choose a smaller one, or full"
            )

    @property
    def batch_size(self) -> int:
        """Samples of a step of the optimizer, over all processes."""
        if self.asked_batch_size != "full":
            return self.asked_batch_size
        assert self.splits is not None, "call setup first"
        return len(self.splits.train)

    def forward_size(self, world_size: int) -> int:
        """The fewest samples that a forward pass of training sees in one of `world_size` processes.

        Raises:
            ValueError: the batch does not divide by the processes.
        """
        if self.batch_size % world_size:
            full = self.asked_batch_size == "full"
            what = f"the {self.batch_size} training samples do" if full else "it is the global batch and does"
            nearest = self.batch_size // world_size * world_size
            raise ValueError(
                f"batch_size={self.asked_batch_size}: {what} not divide by {world_size} processes; choose "
                f"{nearest or world_size}, or another multiple of {world_size}"
            )
        share = self.batch_size // world_size
        return share if self.micro_batch_size is None else share // -(-share // self.micro_batch_size)

    def example(self, world_size: int) -> Batch:
        """The first training samples as a model gets them, as many as a forward pass in one of `world_size` processes.

        Raises:
            ValueError: the batch does not divide by the processes, or there are more of them than samples to evaluate.
        """
        assert self.splits is not None, "call setup first"
        for name, split in (("validation", self.splits.val), ("test", self.splits.test)):
            if len(split) < world_size and not (name == "validation" and len(split) == 0):
                raise ValueError(f"{len(split)} {name} samples cannot be shared by {world_size} processes; use fewer")
        self.forward_size(world_size)
        indices = list(range(self.batch_size // world_size))
        batch = self.on_after_batch_transfer(Seeded(self.splits.train, self.seed)[0, indices], 0)
        return batch.parts(self.micro_batch_size)[-1]  # the last part is the smallest

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if batch.targets.device == device:
            return batch
        return batch.on(device)

    def first(self, number: int) -> Batch:
        """The first training samples, at most so many, as a model gets them where nothing is augmented."""
        assert self.splits is not None, "call setup first"
        train = self.splits.train
        return self.on_after_batch_transfer(train[range(min(number, len(train)))], 0)

    def train_dataloader(self) -> Any:
        return self.loader("train")

    def val_dataloader(self) -> Loader | list[Any]:
        assert self.splits is not None, "call setup first"
        return self.loader("val") if len(self.splits.val) else []  # Lightning leaves a validation without loaders out

    def test_dataloader(self) -> Loader:
        return self.loader("test")

    def loader(self, name: Literal["train", "val", "test"]) -> Loader:
        split = self.on_device(name)
        rank, world_size = self.place
        if name == "train":
            order = self.training_order(split, rank, world_size)
            return Loader(split, order, num_workers=self.num_workers, seeded=self.augmented, position=self.position)
        # no batch of an evaluation is larger than a forward pass of training may be
        size = min(self.batch_size, (self.micro_batch_size or self.batch_size) * world_size)
        order = BatchOrder(len(split), batch_size=size, shuffle=False, seed=self.seed, rank=rank, world_size=world_size)
        # the views of an evaluation are those of epoch 0: the same in each evaluation
        seeded = self.augmented and self.num_views > 0
        return Loader(split, order, num_workers=self.num_workers, seeded=seeded)

    @property
    def place(self) -> tuple[int, int]:
        """This process and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def training_order(self, split: Split, rank: int, world_size: int) -> BatchOrder:
        """Which training samples make up each batch."""
        return BatchOrder(
            len(split), batch_size=self.batch_size, shuffle=True, seed=self.seed, rank=rank, world_size=world_size
        )

    def position(self) -> tuple[int, int]:
        """The epoch of training, and how many of its batches it has seen: a resumed run stands somewhere within one."""
        if self.trainer is None or not self.trainer.training:
            return 0, 0
        fit = self.trainer.fit_loop
        epoch: Any = fit.epoch_progress.current
        return 0 if self.repeats_first_epoch else epoch.processed, fit.epoch_loop.batch_progress.current.ready

    def on_device(self, name: str) -> Split:
        """A split, on the accelerator where there is one and the data take little of its memory."""
        assert self.splits is not None, "call setup first"
        split: Split = getattr(self.splits, name)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type != "cuda" or self.num_workers or not isinstance(split, Tensors):
            return split
        if not self.resident:  # the parts share tensors: each is moved once
            parts = (part for part in vars(self.splits).values() if isinstance(part, Tensors))
            tensors = {tensor for part in parts for tensor in part.all if tensor is not None}
            free, _ = torch.cuda.mem_get_info(device)
            fits = sum(tensor.nbytes for tensor in tensors) < RESIDENT_SHARE * free
            self.resident = {tensor: tensor.to(device) if fits else tensor for tensor in tensors}
        return split.on(self.resident)

    def unusual(self) -> list[str]:
        """What a person should know of the parts before trusting a number."""
        return [] if self.folds is None else [f"validated on fold {self.fold} of {self.folds}"]

    def record(self) -> dict[str, Any]:
        """What is recorded of the data beside the config."""
        assert self.splits is not None, "call setup first"
        return {"fingerprint": self.fingerprint, **{name: len(split) for name, split in vars(self.splits).items()}}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of its data."""
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on other data.

        Raises:
            ValueError: the fingerprints differ.
        """
        if self.splits is not None and state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the checkpoint was trained on other data (fingerprint {state['fingerprint'][:12]}) than these "
                f"({self.fingerprint[:12]}): a file, a split or a fold has changed; give the data of the run"
            )
