"""LightningModules and data written as their authors would, without a thought of this project."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler
from torchmetrics import MeanAbsoluteError


class Noise(Dataset[dict[str, Any]]):
    """Samples that draw from all three global generators each time they are read."""

    def __init__(self, size: int = 23) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "x": torch.randn(8) + index / 10,
            "y": torch.tensor(random.random()),
            "nested": [np.random.rand(2), str(index)],  # noqa: NPY002 (as many data sets do)
        }


class NoiseData(L.LightningDataModule):
    def __init__(self, batch_size: int = 4, num_workers: int = 0, size: int = 23) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        workers = self.hparams["num_workers"]
        return DataLoader(
            Noise(self.hparams["size"]),
            batch_size=self.hparams["batch_size"],
            shuffle=True,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noise(9), batch_size=4, num_workers=self.hparams["num_workers"])

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


class Regression(L.LightningModule):
    """Metrics, means over epochs, dropout, a counter, a running mean and a schedule that waits for a metric."""

    def __init__(self, hidden: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, hidden), nn.Dropout(0.3), nn.Linear(hidden, 1))
        self.train_mae, self.valid_mae = MeanAbsoluteError(), MeanAbsoluteError()
        self.num_seen = 0
        self.running: float | Tensor = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.num_seen += len(batch["x"])
        prediction = self(batch["x"])
        loss = F.mse_loss(prediction, batch["y"])
        self.running = 0.9 * self.running + 0.1 * loss.detach()
        self.train_mae(prediction, batch["y"])
        size = len(batch["x"])
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=size)
        self.log("train_mae", self.train_mae, on_step=False, on_epoch=True, batch_size=size)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=size)
        self.log("running", self.running)
        if batch_idx == 0:
            self.log("first", loss, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.valid_mae(self(batch["x"]) + torch.randn(()), batch["y"])
        self.log("valid_mae", self.valid_mae, batch_size=len(batch["x"]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test_mse", F.mse_loss(self(batch["x"]), batch["y"]), batch_size=len(batch["x"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "valid_mae"}}


class GAN(L.LightningModule):
    """Two optimizers that take turns, one of them in every second batch, and gradients kept for later by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 8), nn.Linear(8, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()  # type: ignore[misc]
        fakes = self.generator(torch.randn(len(batch["x"]), 4))
        self.toggle_optimizer(of_discriminator)
        loss = (
            F.softplus(-self.discriminator(batch["x"])).mean() + F.softplus(self.discriminator(fakes.detach())).mean()
        )
        of_discriminator.zero_grad()
        self.manual_backward(loss)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)
        self.log("d_loss", loss, prog_bar=True)

        self.toggle_optimizer(of_generator)
        loss = F.softplus(-self.discriminator(fakes)).mean()
        self.manual_backward(loss / 3)
        if batch_idx % 3 == 2:
            of_generator.step()
            of_generator.zero_grad()
            self.log("g_loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["x"]))
        self.untoggle_optimizer(of_generator)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.01),
        ]


class WithoutOptimizer(L.LightningModule):
    """Trains on whatever tensors a batch has, of any number of loaders; logs nothing, and leaves the optimizer open."""

    def __init__(self, features: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(features, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
        return torch.stack([self.layer(part).square().mean() for part in parts]).sum()


class SumOfInputs(WithoutOptimizer):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OnDigits(SumOfInputs):
    """Takes the batches of this project's images."""

    def __init__(self) -> None:
        super().__init__(features=8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch.inputs, batch_idx)


class Rows(Dataset[Tensor]):
    def __init__(self, size: int) -> None:
        self.data = torch.arange(size * 4.0).view(size, 4) / size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]


class Stream(IterableDataset[Tensor]):
    """Rows in an order that each pass draws anew, shared by workers."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in torch.randperm(self.size).tolist()[first::step]:
            yield torch.full((4,), index / 10) + torch.randn(4) / 10


class OwnOrder(Sampler[int]):
    """Shuffles by itself, from a generator that it keeps from epoch to epoch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.random = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(self.size), self.size))

    def __len__(self) -> int:
        return self.size


class Batches:
    """Batches without a DataLoader, as loaders of other libraries give them."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.randn(3, 4) for _ in range(5))


class Loaders(L.LightningDataModule):
    """Loaders by their names."""

    def __init__(self, kind: str, num_workers: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        rows = Rows(12)
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        if self.kind == "two":
            short = DataLoader(Rows(5), batch_size=2, shuffle=True, **workers)
            return {"long": DataLoader(rows, batch_size=2, shuffle=True, **workers), "short": short}
        if self.kind == "combined":
            both = [DataLoader(rows, batch_size=2, shuffle=True), DataLoader(Stream(), batch_size=3, **workers)]
            return L.pytorch.utilities.CombinedLoader(both, "min_size")
        return {
            "own_order": lambda: DataLoader(rows, batch_size=3, sampler=OwnOrder(12), **workers),
            "own_batches": lambda: DataLoader(rows, batch_sampler=BatchSampler(OwnOrder(12), 3, False), **workers),
            "stream": lambda: DataLoader(Stream(), batch_size=2, **workers),
            "own_way": lambda: InOwnWay(rows, batch_size=2, shuffle=True, **workers),
            "unbatched": lambda: DataLoader(rows, batch_size=None, shuffle=True, **workers),
            "batches": lambda: Batches(),
        }[self.kind]()


class OwnNoise(Dataset[Tensor]):
    """Draws from a generator of its own, which nobody else can seed."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.random.normal(size=4)).float()


class OwnNoiseData(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(OwnNoise(), batch_size=3)


class Growing(Dataset[Tensor]):
    """Changes while it is read, as a replay buffer does."""

    def __init__(self) -> None:
        self.rows = [torch.full((4,), float(i)) for i in range(12)]

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        row = self.rows[index]
        if index == 11:
            self.rows = [row + 1 for row in self.rows]
        return row


class GrowingData(L.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.dataset = Growing()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.dataset, batch_size=3)


class SometimesNone(Regression):
    """Leaves every second step out."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class Freezes(Regression):
    """Keeps batch norm in eval mode and frozen from the second epoch on, as fine-tuning does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[1].eval()
            self.net[0].requires_grad_(False)


class MakesLayersLate(SumOfInputs):
    """Builds its network when it is set up."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def configure_model(self) -> None:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(4, 1)


class InOwnWay(DataLoader[Tensor]):
    """A loader that iterates in its own way."""

    def __iter__(self) -> Any:
        return (batch + 1 for batch in super().__iter__())


class Diverges(SumOfInputs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 2 else loss


class Average:
    """Keeps its value in an object that is no tensor and no plain data."""

    def __init__(self) -> None:
        self.value = 0.0


class HoldsObjects(SumOfInputs):
    """Trains with an object's value, and has the object in its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.average = Average()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.average.value = 0.9 * self.average.value + 0.1 * float(loss.detach())
        return loss * (1 + self.average.value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = {"averages": [self.average], "array": np.arange(3)[::-1], np.int64(3): "a strange key"}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        [self.average] = checkpoint["own"]["averages"]


class HoldsALock(SumOfInputs):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = {"lock": threading.Lock()}


class Slots:
    """A batch of an object that keeps a tensor without a `__dict__`, and prints as its address."""

    __slots__ = ("inputs",)

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def in_slots(rows: list[Tensor]) -> Slots:
    return Slots(torch.stack(rows))


class SumOfSlots(SumOfInputs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch.inputs, batch_idx)
