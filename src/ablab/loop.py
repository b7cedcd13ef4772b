"""One step of training after another: Lightning's loop over the batches of an epoch, without what no one listens to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor


class TrainingEpoch(_TrainingEpochLoop):
    """Does what Lightning's does in a step, in the same order, with less around it.

    Lightning calls each of some twenty hooks of a step on every callback, the module and the strategy, and opens a
    context for a profile around each; the batch, the closure and the optimizer are wrapped on their way. On a small
    model that is a tenth of a step. Here a hook is called where someone has defined it. All that happens once an epoch,
    and the step at which a run resumes, is Lightning's.
    """

    hooks: dict[str, list[Callable[..., Any]]]

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        self.hooks = {name: self.listeners(name) for name in HOOKS}

    def listeners(self, name: str) -> list[Callable[..., Any]]:
        """Who does something at a hook: callbacks, in their order, then the module."""
        trainer, task = self.trainer, self.trainer.lightning_module
        found = [
            partial(getattr(callback, name), trainer, task)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if getattr(type(callback), name) is not getattr(Callback, name)
        ]
        if getattr(type(task), name, None) is not getattr(LightningModule, name, None):
            found.append(getattr(task, name))
        return found

    def call(self, name: str, *arguments: Any) -> None:
        vars(self.trainer.lightning_module)["_current_fx_name"] = name  # for `self.log` in a hook
        for hook in self.hooks[name]:
            hook(*arguments)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.restarting:
            return super().advance(data_fetcher)
        trainer, task, strategy = self.trainer, self.trainer.lightning_module, self.trainer.strategy
        self.val_loop.restarting = False
        batch, _, _ = next(data_fetcher)
        number = self.batch_idx + 1
        progress = self.batch_progress
        progress.is_last_batch = data_fetcher.done
        datamodule = trainer.datamodule
        batch = trainer.precision_plugin.convert_input(batch)
        batch = datamodule.transfer_batch_to_device(batch, strategy.root_device, 0)
        batch = datamodule.on_after_batch_transfer(batch, 0)
        progress.increment_ready()
        trainer._logger_connector.on_batch_start(batch)
        self.call("on_train_batch_start", batch, number)
        progress.increment_started()
        optimizer = trainer.optimizers[0]
        steps = self.automatic_optimization.optim_progress.optimizer
        steps.step.increment_ready()
        outputs: dict[str, Any] = {}

        def forward_and_backward() -> Tensor:
            vars(task)["_current_fx_name"] = "training_step"
            loss = strategy.training_step(batch, number)
            steps.zero_grad.increment_ready()
            self.call("on_before_zero_grad", optimizer)
            steps.zero_grad.increment_started()
            steps.zero_grad.increment_completed()
            self.call("on_before_backward", loss)
            strategy.precision_plugin.backward(loss, task, optimizer)
            outputs["loss"] = loss.detach()
            self.call("on_after_backward")
            self.call("on_before_optimizer_step", optimizer)
            trainer.precision_plugin._clip_gradients(
                task, optimizer, trainer.gradient_clip_val, gradient_clip_algorithm=trainer.gradient_clip_algorithm)
            return outputs["loss"]

        optimizer.step(forward_and_backward)
        steps.step.increment_completed()
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        self.call("on_train_batch_end", outputs, batch, number)
        trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        trainer._logger_connector.update_train_step_metrics()


HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
