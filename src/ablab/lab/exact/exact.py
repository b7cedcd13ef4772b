"""A callback that makes any LightningModule, with any loaders, resume to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ablab.data.loader import Resumable
from ablab.lab.exact import state
from ablab.lab.exact.loaders import (
    LoaderContext,
    ResumableLoader,
    is_seekable,
    print_warning,
    rebuild_loader,
    samplers_of,
)
from ablab.lab.exact.randomness import seed_all
from ablab.lab.internals import (
    align_reloads,
    logged_means,
    modules_in_eval_mode,
    refetch_first_batch,
    restore_logged_means,
)
from ablab.optim.schedules import unblock_epoch_schedulers
from ablab.tasks.metric_state import gather_objects, metric_states, restore_metrics

HOOKS = ("train_dataloader", "val_dataloader", "test_dataloader")


class Exact(L.Callback):
    """Seeds every step, wraps the loaders, and saves state that Lightning's checkpoints leave out.

    - Before each training batch, the global generators are seeded from (seed, batch number, rank); before each
    evaluation
      batch, from (seed, stage, batch number, rank).
    - The loaders of the data module or the module become `ResumableLoader`s.
    - Checkpoints also hold the states of all torchmetrics of the module, the epoch means of `self.log`, the module's
    plain
      attributes that change in training, and with manual optimization the gradients.

    It must be among the first callbacks, so that hooks of other callbacks at the start of a step draw seeded numbers.

    Args:
        seed: of all random numbers.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed
        self.all_loaders: list[ResumableLoader] = []
        self.loaders: list[ResumableLoader] = []  # the training loaders
        self.trainer: L.Trainer | None = None
        self.versions: dict[tuple[str, str], Any] = {}
        self.saved: dict[str, Any] | None = None
        self.unwrapped: list[tuple[Any, str, Any]] = []  # owners, hooks, and the previous instance attributes

    # Loaders ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer = trainer
        for owner in filter(None, (trainer.datamodule, pl_module)):  # type: ignore[attr-defined]
            for hook in HOOKS:
                self.unwrapped.append((owner, hook, vars(owner).get(hook)))
                setattr(owner, hook, self.wrap_hook(getattr(owner, hook), hook.removesuffix("_dataloader")))
        self.versions = state.version_marks(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for owner, hook, before in reversed(self.unwrapped):
            if before is None:
                delattr(owner, hook)
            else:
                setattr(owner, hook, before)
        for loader in self.all_loaders:
            loader.close()
        self.unwrapped, self.all_loaders = [], []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")  # Lightning does not call it after an exception

    def wrap_hook(self, original: Callable[[], Any], stage: str) -> Callable[[], Any]:
        """Return a loader hook that returns resumable loaders."""

        @wraps(original)
        def hook() -> Any:
            assert self.trainer is not None
            # the hook may draw random numbers to split or shuffle; it is called again when loaders are reloaded
            every = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            seed_all(self.seed, stage, self.trainer.current_epoch // every if every else 0)
            return self.wrap_loaders(original(), stage)

        return hook

    def wrap_loaders(self, given: Any, stage: str) -> Any:
        """Return the result of a loader hook with every loader wrapped."""
        if given is None or isinstance(given, Resumable):
            return given
        number = 0

        def wrap(loader: Any, mode: Any = "max_size_cycle") -> Any:
            nonlocal number
            if isinstance(loader, Resumable | ResumableLoader):
                return loader
            if self.is_overfitting and is_seekable(loader) and loader.batch_size is not None:
                loader = rebuild_loader(loader)  # without shuffling, as in Lightning
            name = stage if number == 0 else f"{stage} {number}"
            number += 1
            wrapped = ResumableLoader(
                loader, seed=self.seed, name=name, context=self.loader_context(stage, loader, mode)
            )
            self.all_loaders.append(wrapped)
            if stage == "train":
                self.loaders.append(wrapped)
            return wrapped

        if stage == "train":
            self.loaders = []
        if isinstance(given, list | tuple | dict):  # combined as in Lightning
            given = CombinedLoader(given, "max_size_cycle" if stage == "train" else "sequential")
        if isinstance(given, CombinedLoader):
            given.flattened = [wrap(loader, given._mode) for loader in given.flattened]
            return given
        return wrap(given)

    @property
    def is_overfitting(self) -> bool:
        return bool(self.trainer and self.trainer.overfit_batches and self.trainer.state.fn == "fit")  # type: ignore[attr-defined]

    def loader_context(self, stage: str, loader: Any, mode: Any) -> LoaderContext:
        """Return the context in which a loader is used."""
        trainer = self.trainer
        assert trainer is not None
        has_own = any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(loader))
        shards = trainer._accelerator_connector.use_distributed_sampler and trainer.world_size > 1 and not has_own
        is_whole = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if shards and is_whole and not is_seekable(loader):
            print_warning(
                f"{stage}: every process reads all samples of {type(loader).__name__}, which iterates in its own way; "
                "give it a DistributedSampler"
            )
        return LoaderContext(
            position=self.position if stage == "train" else lambda: (0, 0),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            shards=shards,
            mode=mode,
        )

    def position(self) -> tuple[int, int]:
        """Return the training epoch and the number of completed batches in it."""
        assert self.trainer is not None
        fit = self.trainer.fit_loop
        epoch: Any = fit.epoch_progress.current
        return epoch.processed, fit.epoch_loop.batch_progress.current.completed

    # Random numbers -----------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seed_all(self.seed, "epoch", trainer.current_epoch, trainer.global_rank)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed_all(self.seed, "step", trainer.current_epoch, batch_idx, trainer.global_rank)
        unblock_epoch_schedulers(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for loader in self.loaders:
            if (problem := loader.check_unchanged()) is not None:
                print_warning(f"a resumed run will differ: {loader.name}: {problem}")
        seed_all(self.seed, "epoch end", trainer.current_epoch, trainer.global_rank)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seed_all(self.seed, "validation", trainer.global_rank)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_all(self.seed, "validation", dataloader_idx, batch_idx, trainer.global_rank)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            unblock_epoch_schedulers(trainer)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        seed_all(self.seed, "test", dataloader_idx, batch_idx, trainer.global_rank)

    # Checkpoints --------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for loader in self.loaders:
            if (problem := loader.check_reproducible()) is not None:
                print_warning(f"a resumed run will differ: {loader.name}: {problem}")
        if self.saved is not None:
            self.restore(trainer, pl_module, self.saved)
        self.saved = None
        seed_all(self.seed, "start", trainer.global_rank)

    def restore(self, trainer: L.Trainer, pl_module: L.LightningModule, saved: dict[str, Any]) -> None:
        """Restore the state that a checkpoint holds beside Lightning's."""
        if len(saved["processes"]) != trainer.world_size:
            number = len(saved["processes"])
            print_warning(
                f"the run had {number} processes and has {trainer.world_size}; the result will not be bit-identical"
            )
        own = saved["processes"][trainer.global_rank % len(saved["processes"])]
        known = {name: metric for name, metric in state.metrics_of(pl_module).items() if name in own["metrics"]}
        restore_metrics(known, [own["metrics"]], rank=0, world_size=1)
        state.restore_attributes(pl_module, own["attributes"], pl_module.device)
        for name, module in pl_module.named_modules():
            module.training = name not in own["evaluated"]
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(name not in own["frozen"])
        for name, gradient in own["gradients"].items():
            pl_module.get_parameter(name).grad = gradient.to(pl_module.device)
        for name, value in own["callback_metrics"].items():
            trainer.callback_metrics[name] = value.to(pl_module.device)
        if own["logged"]:
            restore_logged_means(trainer, pl_module, own["logged"])
        for loader, digest in zip(self.loaders, own["batches"], strict=False):
            loader.expected = digest
            loader.entered, loader.cycle = None, 0
        align_reloads(trainer)
        if any(loader.length() is None for loader in self.loaders):
            refetch_first_batch(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        position = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        manual = not pl_module.automatic_optimization
        gradients = {n: p.grad for n, p in pl_module.named_parameters() if manual and p.grad is not None}
        own = {
            "metrics": metric_states(state.metrics_of(pl_module)),
            "attributes": state.changed_attributes(pl_module, self.versions),
            "gradients": state.detach_to_cpu(gradients),
            "evaluated": modules_in_eval_mode(trainer, pl_module),
            "frozen": [name for name, parameter in pl_module.named_parameters() if not parameter.requires_grad],
            "logged": logged_means(trainer),
            "callback_metrics": {
                name: value.detach().cpu()
                for name, value in trainer.callback_metrics.items()
                if isinstance(value, Tensor)
            },
            "batches": [loader.digest_before(position) for loader in self.loaders],
        }
        checkpoint["exact"] = {"processes": gather_objects(own)}
        # classes and other objects cannot be loaded as plain data
        for key in ("hparams_type", "datamodule_hparams_type"):
            checkpoint.pop(key, None)
        for key in ("hyper_parameters", "datamodule_hyper_parameters"):
            if key in checkpoint:
                checkpoint[key] = {k: v for k, v in checkpoint[key].items() if state.is_plain(v)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint.get("exact")


def seed_before_fit(seed: int) -> None:
    """Seed the global generators as training does before data modules and modules are set up."""
    torch.manual_seed(seed)  # also seeds accelerators that are not initialized yet
    seed_all(seed, "setup")
