"""The cost of exact resuming for an external LightningModule, against a step of plain Lightning.

Both train the same module on the same loader, and log every ten steps.

"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ablab.lab.exact.fit import fit
from ablab.models.resnet import ResNet
from ablab.norms.batch import BatchNorm
from benchmarks.measuring import Ratio, measure
from benchmarks.step import EVERY, LAST, SKIPPED, Clock

STEPS = 200


class Classifier(L.LightningModule):
    """A module as in tutorials."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.model: nn.Module = ResNet(in_channels=1, num_classes=10, depth=8, width=16, norm=BatchNorm())
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        logits = self.model(images)
        loss = F.cross_entropy(logits, targets)
        self.accuracy(logits, targets)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def train_dataloader(self) -> Any:
        images, targets = load_digits(return_X_y=True)
        samples = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(targets)
        return DataLoader(TensorDataset(*samples), batch_size=self.batch_size, shuffle=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def seconds(batch_size: int, device: torch.device, *, attached: bool) -> float:
    """Return the seconds per step, after the first ones."""
    torch.manual_seed(0)
    clock = Clock(SKIPPED + STEPS)
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {} if attached else {"logger": L.pytorch.loggers.CSVLogger(folder)}
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=-1,
            max_steps=SKIPPED + STEPS + LAST,
            log_every_n_steps=EVERY,
            callbacks=[clock],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            **{"logger": False, **settings},
        )
        module = Classifier(batch_size)
        if attached:
            fit(trainer, module, folder=folder)
        else:
            trainer.fit(module)
    return clock.seconds / STEPS


def guest(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure a step of an external module with exact resuming, against plain Lightning."""
    for batch_size in (8, 64):

        def timed(attached: bool, batch_size: int = batch_size) -> Callable[[], float]:
            return lambda: seconds(batch_size, device, attached=attached)

        place = f"resnet-8, {batch_size} digits"
        yield measure(place, "resumable", timed(True), "plain Lightning", timed(False), rounds, warmup=1)
