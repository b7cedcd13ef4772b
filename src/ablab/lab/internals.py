"""Private parts of Lightning that the project depends on, and what happens where Lightning has changed.

Tried with Lightning 2.6. On a version without one of these parts, what it serves is left out of checkpoints.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from ablab.lab.exact.state import detached

try:
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
except ImportError:  # another version
    _Metadata = _ResultMetric = _Sync = None  # type: ignore[assignment,misc]


FIELDS = (  # of what `self.log` was told
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph"),
    *("add_dataloader_idx", "dataloader_idx", "metric_attribute"),
)


def logged_means(trainer: L.Trainer) -> dict[str, Any]:
    """Return what `self.log` has summed up in this epoch of training and its last values, as plain data."""
    found = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.has_reset:
            continue
        own = {name: getattr(meta, name) for name in FIELDS}
        own |= {"reduce_fx": meta.reduce_fx.__name__, "sync_dist": meta.sync.should}
        own |= {"rank_zero_only": meta.sync.rank_zero_only, "is_tensor": result.is_tensor}
        if isinstance(result._forward_cache, Tensor):  # the last value, which is logged again until there is another
            own["last"] = detached(result._forward_cache)
        if result.is_tensor:
            own["value"] = detached(result.value)
            own["updates"] = result.update_count
            if meta.is_mean_reduction:
                own["cumulated_batch_size"] = detached(result.cumulated_batch_size)
        found[key] = own
    return found


def restore_logged_means(trainer: L.Trainer, module: L.LightningModule, saved: dict[str, Any]) -> None:
    """Have `self.log` go on from what it had summed up when a checkpoint was written."""
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
    trainer._logger_connector._first_loop_iter = True  # otherwise the first batch would set the sums back to zero


def modules_in_eval_mode(trainer: L.Trainer, module: L.LightningModule) -> list[str]:
    """Return the modules that training has put into eval mode; in a validation, all are for the time being."""
    before: dict[str, bool] = {}
    if trainer.validating:
        before = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return [name for name, child in module.named_modules() if not before.get(name, child.training)]


def align_reloads(trainer: L.Trainer) -> None:
    """Have a resumed run reload its loaders in the epochs in which an uninterrupted one does."""
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    if every:
        trainer.fit_loop._last_train_dl_reload_epoch = trainer.current_epoch // every * every


def restart_fetching(trainer: L.Trainer) -> None:
    """Have training fetch its first batch anew: Lightning has fetched it before it has restored where a run stands."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)
