"""Generative adversarial networks for images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.data.rng import index_seeds, normal
from ablab.models.interface import NormFactory
from ablab.tasks.heads import remove_head
from ablab.tasks.task import Stage, Task, make_metrics

CHUNK = 1024  # rows of the kernel matrix computed at once
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # bandwidths of the kernels, in standard deviations of a pixel
NOISE = 0  # random stream of the evaluation noise, see `ablab.data.rng`


class Generator(nn.Module):
    """The DCGAN generator: a linear layer, then transposed convolutions that double the image size.

    A norm and a ReLU follow each layer but the last. There is no final tanh, since the data are standardized.

    Shape:
        noise `(N, noise_size)` -> images `(N, *shape)`
    """

    def __init__(self, shape: tuple[int, ...], *, norm: NormFactory, noise_size: int, width: int) -> None:
        super().__init__()
        channels, *size = shape
        num_doublings = 0
        while all(side % 2 == 0 and side > 2 for side in size):
            size, num_doublings = [side // 2 for side in size], num_doublings + 1
        widths = [width * 2**i for i in range(num_doublings, -1, -1)]
        self.start = (widths[0], *size)
        linear = nn.Linear(noise_size, widths[0] * size[0] * size[1])
        layers: list[nn.Module] = [norm.wrap(linear), nn.Unflatten(1, self.start)]
        layers.append(norm(widths[0], "image", activation=nn.ReLU()))
        for before, after in pairwise(widths):
            conv = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
            if not norm.needs_bias:  # removed after init, so that all norms get the same weights for a seed
                conv.register_parameter("bias", None)
            layers += [norm.wrap(conv), norm(after, "image", activation=nn.ReLU())]
        layers.append(norm.wrap(nn.Conv2d(width, channels, 3, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.layers(noise)
        return images


class Networks(nn.Module):
    """The generator and the discriminator in one module."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator


class GAN(Task):
    """A GAN with the non-saturating loss and alternating updates.

    In each training step, the discriminator is updated on the batch and as many generated images, then the generator is
    updated. The networks have separate optimizers and schedules with the same settings; both updates together count as
    one step.

    Metrics: mmd (unbiased estimate of the squared maximum mean discrepancy in pixel space, between the images of the
    split and as many images generated from fixed noise, averaged over Gaussian kernels of five bandwidths; about 0 for
    equal distributions, and sometimes below, because it is unbiased). In training: discriminator_loss, generator_loss
    and the generator's gradient_norm. An evaluation stores all images of the split.

    Args:
        model: a classifier; its `head` is replaced by a single output, which makes it the discriminator.
        optimizer, scheduler, seed: see `Task`; both networks get the same settings.
        norm: factory of the generator's norm layers.
        input_shape: shape of an image, channels first.
        noise_size: dimension of the noise vector.
        width: channels of the generator's last hidden layer; each earlier layer has twice as many.
        micro_batch_size: must be None.

    Raises:
        ValueError: a value is out of range, or the model has no linear `head`.

    References:
        Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661;
        Radford et al. 2015 (DCGAN), https://arxiv.org/abs/1511.06434;
        Gretton et al. 2012 (MMD), https://jmlr.org/papers/v13/gretton12a.html
    """

    monitorable: ClassVar = {"mmd": "min"}
    takes: ClassVar = ("images",)

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
        norm: NormFactory,
        input_shape: tuple[int, ...],
        noise_size: int = 64,
        width: int = 32,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("noise_size", noise_size), ("width", width)):
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is needed")
        model.head = norm.wrap(nn.Linear(remove_head(model), 1))
        networks = Networks(Generator(input_shape, norm=norm, noise_size=noise_size, width=width), model)
        super().__init__(
            model=networks, optimizer=optimizer, scheduler=scheduler, micro_batch_size=micro_batch_size, seed=seed
        )
        self.automatic_optimization = False
        self.noise_size = noise_size
        self.train_metrics = make_metrics({})
        self.val_metrics = make_metrics({"mmd": MaximumMeanDiscrepancy()})
        self.test_metrics = make_metrics({"mmd": MaximumMeanDiscrepancy()})

    def check_data(self, data: DataModule) -> None:
        if data.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={data.micro_batch_size}: a step of a GAN takes its batch whole; set "
                "data.micro_batch_size=null"
            )

    def trained_parts(self) -> list[nn.Module]:
        return [self.model.discriminator, self.model.generator]  # type: ignore[list-item]

    def noise_for(self, real: Tensor) -> Tensor:
        """Draw one noise vector per real image `(N, noise_size)`."""
        return torch.randn(len(real), self.noise_size, device=real.device).to(self.dtype)

    def generate(self, noise: Tensor) -> Tensor:
        images: Tensor = self.model.generator(noise)  # type: ignore[operator]
        return images

    def discriminate(self, images: Tensor) -> Tensor:
        """Return the discriminator's logits for "real" `(N, 1)`."""
        logits: Tensor = self.model.discriminator(images)  # type: ignore[operator]
        return logits

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of the batch's images and of as many generated images `(N, 2)`."""
        real = batch.inputs.to(self.dtype)
        fake = self.generate(self.noise_for(real))
        return torch.cat([self.discriminate(real), self.discriminate(fake)], 1)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the discriminator's loss, the sum of the cross entropies of real and generated images."""
        real, fake = logits.unbind(1)
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        optimizers: Any = self.optimizers()
        real = batch.inputs.to(self.dtype)
        fake = self.generate(self.noise_for(real))

        logits = torch.cat([self.discriminate(real), self.discriminate(fake.detach())], 1)
        optimizers[0].zero_grad()
        self.manual_backward(self.loss(logits, batch))
        self.observed["train/discriminator_loss"] = self.step_loss
        # bypasses Lightning's step counter, so that max_steps and schedules count a batch as one step
        self.trainer.strategy.optimizer_step(optimizers[0].optimizer, lambda: None, self)

        optimizers[1].zero_grad()
        self.manual_backward(F.softplus(-self.discriminate(fake)).mean())
        self.observed["train/generator_loss"] = self.observed.pop("train/loss")
        optimizers[1].step()

        for schedule in self.trainer.lr_scheduler_configs:
            if schedule.interval == "step" or self.trainer.is_last_batch:
                schedule.scheduler.step()  # type: ignore[call-arg]

    def update(self, metrics: MetricCollection, logits: Tensor, loss: Tensor, batch: Batch) -> None:
        metric: Any = metrics["mmd"]
        noise = self.fixed_noise(metric.num_images, len(batch.inputs))
        metric.update(batch.inputs, self.generate(noise))

    def evaluate(self, batch: Batch, stage: Stage) -> None:
        # MMD needs the images only, no logits or loss
        self.update(self.metrics(stage), batch.inputs, batch.inputs, batch)

    def fixed_noise(self, first: int, number: int) -> Tensor:
        """Return the evaluation noise, which depends on the image's index only, not on the division into batches."""
        indices = torch.arange(first, first + number, device=self.device) * self.trainer.world_size + self.global_rank
        return normal(index_seeds(self.seed, indices), NOISE, (self.noise_size,)).to(self.dtype)

    def sample_images(self, number: int) -> Tensor:
        """Return images generated from fixed noise, for `ablab.callbacks.image_samples`."""
        seeds = index_seeds(self.seed, torch.arange(number, device=self.device))
        return self.generate(normal(seeds, NOISE, (self.noise_size,)).to(self.dtype))


class MaximumMeanDiscrepancy(Metric):
    """Unbiased estimate of the squared maximum mean discrepancy; stores all images. NaN for fewer than two images."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.num_images = 0  # in this process
        self.add_state("real", [], dist_reduce_fx="cat")
        self.add_state("fake", [], dist_reduce_fx="cat")

    def update(self, real: Tensor, fake: Tensor) -> None:
        self.num_images += len(real)
        self.real.append(real.flatten(1).float())  # type: ignore[union-attr,operator]
        self.fake.append(fake.flatten(1).float())  # type: ignore[union-attr,operator]

    def compute(self) -> Tensor:
        states: list[Any] = [self.real, self.fake]  # lists; tensors after synchronization between processes
        x, y = (torch.cat(state) if isinstance(state, list) else state for state in states)
        return mmd(x, y)

    def reset(self) -> None:
        super().reset()
        self.num_images = 0


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of the squared maximum mean discrepancy between two samples of equal size.

    Shape:
        x, y `(N, F)` -> scalar
    """
    number = len(x)
    within = kernel_sum(x, x) + kernel_sum(y, y) - 2 * number  # excludes the diagonal, where the kernel is 1
    return (within / (number * (number - 1)) - 2 * kernel_sum(x, y) / number**2).float()


def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum over all pairs of the Gaussian kernels' mean over bandwidths, in float64."""
    total = x.new_zeros((), dtype=torch.float64)
    for chunk in x.split(CHUNK):
        distances = torch.cdist(chunk.double(), y.double()).square() / x.shape[1]  # per pixel
        for bandwidth in BANDWIDTHS:
            total += (-distances / (2 * bandwidth**2)).exp().sum() / len(BANDWIDTHS)
    return total
