"""Private parts of Lightning that the project depends on.

Tested with Lightning 2.6. If another version lacks one of them, the state that it holds is left out of checkpoints.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from ablab.lab.exact.state import detach_to_cpu

try:
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
except ImportError:  # another version
    _Metadata = _ResultMetric = _Sync = None  # type: ignore[assignment,misc]


METADATA_FIELDS = (  # arguments of `self.log` kept with each result
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)


def logged_means(trainer: L.Trainer) -> dict[str, Any]:
    """Return the running means and last values of `self.log` in this training epoch, as plain data."""
    found = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.has_reset:
            continue
        own = {name: getattr(meta, name) for name in METADATA_FIELDS}
        own |= {"reduce_fx": meta.reduce_fx.__name__, "sync_dist": meta.sync.should}
        own |= {"rank_zero_only": meta.sync.rank_zero_only, "is_tensor": result.is_tensor}
        if isinstance(result._forward_cache, Tensor):  # the last value, logged until the next update
            own["last"] = detach_to_cpu(result._forward_cache)
        if result.is_tensor:
            own["value"] = detach_to_cpu(result.value)
            own["updates"] = result.update_count
            if meta.is_mean_reduction:
                own["cumulated_batch_size"] = detach_to_cpu(result.cumulated_batch_size)
        found[key] = own
    return found


def restore_logged_means(trainer: L.Trainer, module: L.LightningModule, saved: dict[str, Any]) -> None:
    """Restore the running means of `self.log` from a checkpoint."""
    if _ResultMetric is None:
        return
    results = trainer.fit_loop.epoch_loop._results
    for key, own in saved.items():
        settings = dict(own)
        sync_dist, rank_zero_only = settings.pop("sync_dist"), settings.pop("rank_zero_only")
        is_tensor, value = settings.pop("is_tensor"), settings.pop("value", None)
        size, updates = settings.pop("cumulated_batch_size", None), settings.pop("updates", 0)
        last = settings.pop("last", None)
        meta = _Metadata(**{**settings, "reduce_fx": getattr(torch, settings["reduce_fx"])})
        meta.sync = _Sync(_should=sync_dist, fn=trainer.strategy.reduce, _group=None, rank_zero_only=rank_zero_only)
        result = _ResultMetric(meta, is_tensor)
        if is_tensor:
            assert isinstance(value, Tensor)
            result.value = value.to(module.device)
            result._update_count = updates
            if size is not None:
                result.cumulated_batch_size = size.to(module.device)
        else:
            metric = module.get_submodule(meta.metric_attribute) if meta.metric_attribute else None
            if not isinstance(metric, Metric):
                continue
            result.value = metric
            result._update_count = metric.update_count
        if last is not None:
            result._forward_cache = last.to(module.device)
        results[key] = result
    trainer._logger_connector._first_loop_iter = True  # otherwise the first batch would reset the sums


def modules_in_eval_mode(trainer: L.Trainer, module: L.LightningModule) -> list[str]:
    """Return the modules that training keeps in eval mode; during validation, those that were so before it."""
    before: dict[str, bool] = {}
    if trainer.validating:
        before = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return [name for name, child in module.named_modules() if not before.get(name, child.training)]


def align_reloads(trainer: L.Trainer) -> None:
    """Make a resumed run reload its loaders in the same epochs as an uninterrupted run."""
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if every:
        trainer.fit_loop._last_train_dl_reload_epoch = trainer.current_epoch // every * every


def refetch_first_batch(trainer: L.Trainer) -> None:
    """Fetch the first batch again: Lightning fetches it before it restores the position of a resumed run."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)
