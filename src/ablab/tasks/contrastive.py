"""Contrastive pretraining of an encoder without labels (SimCLR)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.data.stream import ImageStream
from ablab.tasks.all_reduce import AllGather, is_distributed
from ablab.tasks.heads import remove_head
from ablab.tasks.task import Stage, Task, make_metrics

CHUNK = 1024  # rows of the similarity matrix computed at once in evaluation
VOTE_TEMPERATURE = 0.07  # temperature of the kNN votes (Wu et al. 2018)


class Pretraining(nn.Module):
    """An encoder, and a projection head that is used in training only and has no norm, as in the paper.

    Shape:
        images `(N, C, H, W)` -> unit-length embeddings `(N, output_size)`
    """

    def __init__(self, encoder: nn.Module, num_features: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(num_features, hidden_size), nn.ReLU(), nn.Linear(hidden_size, output_size)
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.encoder(images)), dim=-1)


class Contrastive(Task):
    """SimCLR: identify the other augmented view of each image among the views of all images of the batch (NT-Xent).

    Metrics: loss (nats; in evaluation over all views of the split at once, so that it does not depend on the batch size
    or the number of processes), knn_accuracy (accuracy of a k-nearest-neighbor classifier on the encoder's features,
    with votes weighted by exp(cosine similarity / 0.07)). Labels are used for this accuracy only.

    Batch statistics of norms are taken over both views of all samples. With several processes, the loss compares the
    views of all processes. During an evaluation, each process keeps the features of all training samples, without
    augmentation: 4 bytes * samples * features, 10 GB for ImageNet and ResNet-50.

    Args:
        model: a classifier; its `head` is removed, and the rest is the encoder.
        optimizer, scheduler, seed: see `Task`.
        class_names: names of the classes, by class index.
        temperature: temperature of the softmax over similarities.
        hidden_size, output_size: features of the projection head's layers.
        num_neighbors: number of nearest training samples that vote.
        micro_batch_size: must be None, since the loss compares all samples of a batch.

    Raises:
        ValueError: a value is out of range, or the model has no linear `head`.

    References:
        Chen et al. 2020, https://arxiv.org/abs/2002.05709;
        Wu et al. 2018 (kNN classifier), https://arxiv.org/abs/1805.01978
    """

    monitorable: ClassVar = {"loss": "min", "knn_accuracy": "max"}
    takes: ClassVar = ("images",)
    num_views: ClassVar = 2

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        class_names: list[str],
        temperature: float = 0.2,
        hidden_size: int = 128,
        output_size: int = 64,
        num_neighbors: int = 20,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: more than 0 is needed")
        for name, value in (
            ("hidden_size", hidden_size),
            ("output_size", output_size),
            ("num_neighbors", num_neighbors),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
        model = Pretraining(model, remove_head(model), hidden_size, output_size)
        super().__init__(
            model=model, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        self.temperature = temperature
        self.num_neighbors = num_neighbors
        self.train_features: tuple[Tensor, Tensor] | None = (
            None  # features and labels of the training samples, during an evaluation
        )
        self.train_metrics = make_metrics({})
        for stage in ("val", "test"):
            accuracy = MulticlassAccuracy(len(class_names), average="micro", validate_args=False)
            setattr(
                self, f"{stage}_metrics", make_metrics({"loss": SplitNTXent(temperature), "knn_accuracy": accuracy})
            )

    def check_data(self, data: DataModule) -> None:
        if data.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={data.micro_batch_size}: the loss compares all samples of a batch, which cannot be "
                "taken in parts; set data.micro_batch_size=null, and a data.batch_size that fits"
            )
        if data.batch_size < 2:
            raise ValueError("batch_size=1: the loss compares each sample with others; choose 2 or more")
        if not data.augmented:
            raise ValueError(
                "augment is off, and both views of an image would be the same; choose data/augment=contrastive, or "
                "turn on what suits the images, data.augment.crop_padding=4"
            )
        if data.scored == "train":
            raise ValueError("scored=train: each sample would be its own nearest neighbor; score val or test")
        assert data.splits is not None
        if isinstance(data.splits.train, ImageStream):
            raise ValueError("streaming=true: the neighbors are searched among all training images; set it to false")
        if len(data.splits.train) < self.num_neighbors:
            raise ValueError(
                f"{len(data.splits.train)} training samples cannot give task.num_neighbors={self.num_neighbors}; "
                "choose fewer"
            )

    def forward(self, batch: Batch) -> Tensor:
        """Return the embeddings of all views `(N, num_views, output_size)`; a batch without views has one."""
        views = batch.inputs[:, None] if batch.views is None else batch.views
        embeddings: Tensor = self.model(views.flatten(0, 1).to(self.dtype))
        return embeddings.unflatten(0, views.shape[:2])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if not (self.training and is_distributed()):
            return nt_xent(logits, logits, self.temperature)
        everywhere: Tensor = AllGather.apply(logits)
        return nt_xent(logits, everywhere, self.temperature, first=self.global_rank * len(logits))

    def update(self, metrics: Any, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        for name, metric in metrics.items():
            metric.update(logits) if name == "loss" else metric.update(self.predict_knn(batch), batch.targets)

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        logits = self(batch)
        self.update(self.metrics(stage), logits, logits, batch)

    def predict_knn(self, batch: Batch) -> Tensor:
        """Return the classes that the nearest training samples vote for `(N)`."""
        assert self.train_features is not None
        features, labels = self.train_features
        own = self.features(batch)
        with torch.autocast(own.device.type, enabled=False):
            similarities, nearest = (own @ features.T).topk(self.num_neighbors)
        votes = F.one_hot(labels[nearest]) * (similarities / VOTE_TEMPERATURE).exp()[..., None]
        return votes.sum(1).argmax(1)

    def features(self, batch: Batch) -> Tensor:
        return F.normalize(self.model.encoder(batch.inputs.to(self.dtype)).float(), dim=-1)  # type: ignore[operator]

    def compute_train_features(self) -> tuple[Tensor, Tensor]:
        """Return the features and labels of all training samples; each process computes a part and gathers the rest."""
        data: DataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        split, rank, world_size = data.on_device("train"), self.global_rank, self.trainer.world_size
        number = -(-len(split) // world_size)
        # all_gather needs equally many in each process
        share = [min(rank + i * world_size, len(split) - 1) for i in range(number)]
        features, labels = [], []
        for start in range(0, number, CHUNK):
            batch = self.transfer_batch_to_device(split[share[start : start + CHUNK]], self.device, 0)
            with self.trainer.precision_plugin.val_step_context():  # the precision of validation
                features.append(self.features(data.on_after_batch_transfer(batch, 0)))
            labels.append(batch.targets)
        return all_gather_interleaved(torch.cat(features))[: len(split)], all_gather_interleaved(torch.cat(labels))[
            : len(split)
        ]

    def on_validation_epoch_start(self) -> None:
        self.train_features = self.compute_train_features()

    def on_validation_epoch_end(self) -> None:
        self.train_features = None

    def on_test_epoch_start(self) -> None:
        self.train_features = self.compute_train_features()

    def on_test_epoch_end(self) -> None:
        self.train_features = None


class SplitNTXent(Metric):
    """NT-Xent over the views of all samples of a split; stores their embeddings."""

    full_state_update = False

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.add_state("embeddings", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor) -> None:
        self.embeddings.append(embeddings.float())  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        found: Any = self.embeddings
        all_embeddings = torch.cat(found) if isinstance(found, list) else found
        total = all_embeddings.new_zeros((), dtype=torch.float64)
        for first in range(0, len(all_embeddings), CHUNK):
            chunk = all_embeddings[first : first + CHUNK]
            total += nt_xent(chunk, all_embeddings, self.temperature, first=first) * len(chunk)
        return (total / len(all_embeddings)).float()


def nt_xent(embeddings: Tensor, all_embeddings: Tensor, temperature: float, first: int = 0) -> Tensor:
    """Return the normalized temperature-scaled cross entropy (NT-Xent), averaged over views.

    Args:
        embeddings: unit-length embeddings, two views per sample.
        all_embeddings: the samples to compare with; includes `embeddings`.
        temperature: temperature of the softmax over similarities.
        first: index in `all_embeddings` of the first sample of `embeddings`.

    Shape:
        embeddings `(N, 2, D)`, all_embeddings `(M, 2, D)` -> scalar
    """
    views, candidates = embeddings.flatten(0, 1), all_embeddings.flatten(0, 1)
    own = torch.arange(len(views), device=views.device) + 2 * first
    similarities = views @ candidates.T / temperature
    similarities = similarities.scatter(1, own[:, None], -torch.inf)  # exclude the view itself
    return F.cross_entropy(similarities, own ^ 1)  # the two views of a sample have the indices 2i and 2i + 1


def all_gather_interleaved(share: Tensor) -> Tensor:
    """Return the rows of all processes, interleaved: process r of n has the rows r, r + n, …"""
    if not is_distributed():
        return share
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)
