"""A training loop that skips hooks that nobody overrides, in place of Lightning's loop over the batches of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from ablab.tasks.task import Task, is_overridden, uses_grad_scaler

Hook = Callable[..., Any]
STEP_HOOKS = (
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
)


class TrainingEpoch(_TrainingEpochLoop):
    """A training epoch with the steps of Lightning's loop, in the same order, and less overhead.

    Lightning calls every hook of a step on each callback, the module, the data and the strategy, overridden or not, and
    wraps the closure and the optimizer: a tenth of a step of a small network. Here only overridden hooks are called.
    Everything that happens once per epoch, the step at which a run resumes, and modules with their own optimization use
    Lightning's code.
    """

    parts: tuple[Any, ...] = ()
    is_plain = is_direct = False
    transfer: tuple[Hook, ...]
    hooks: dict[str, list[tuple[str, Hook]]]

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        parts = (self.trainer.lightning_module, self.trainer.datamodule, *callbacks)  # type: ignore[attr-defined]
        if parts == self.parts:
            return  # not the first epoch
        self.parts = parts
        self.is_plain, self.is_direct = is_plain(self.trainer), is_direct(self.trainer)
        chosen = self.trainer._data_connector._datahook_selector
        assert chosen is not None
        self.transfer = tuple(
            getattr(chosen.get_instance(name), name)
            for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
        )
        self.hooks = {name: self.overridden_hooks(name) for name in STEP_HOOKS}

    def overridden_hooks(self, name: str) -> list[tuple[str, Hook]]:
        """Return the overridden hooks of a name, with their profiler labels: callbacks first, then the module."""
        trainer, task = self.trainer, self.trainer.lightning_module
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found: list[tuple[str, Hook]] = [
            (f"[Callback]{callback.state_key}.{name}", partial(getattr(callback, name), trainer, task))
            for callback in callbacks
            if is_overridden(callback, name, Callback)
        ]
        if is_overridden(task, name, LightningModule):
            found.append((f"[LightningModule].{name}", getattr(task, name)))
        return found

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a hook on all callbacks and the module; return the last result (the module's, if it has the hook)."""
        vars(self.trainer.lightning_module)["_current_fx_name"] = name  # `self.log` reads the current hook
        part = self.trainer.profiler.profile  # type: ignore[attr-defined]
        answer = None
        for label, hook in self.hooks[name]:
            with part(label):
                answer = hook(*arguments)
        return answer

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.restarting or not self.is_plain:
            super().advance(data_fetcher)
            return
        trainer, task, strategy = self.trainer, self.trainer.lightning_module, self.trainer.strategy
        progress, steps = self.batch_progress, self.automatic_optimization.optim_progress.optimizer
        logged = trainer._logger_connector
        before_transfer, move, after_transfer = self.transfer
        part = trainer.profiler.profile  # type: ignore[attr-defined]  # no overhead unless profiling

        batch, *_ = next(data_fetcher)
        number = self.batch_idx + 1
        progress.is_last_batch = data_fetcher.done
        with part("[Strategy].batch_to_device"):
            batch = before_transfer(trainer.precision_plugin.convert_input(batch), 0)
            batch = after_transfer(move(batch, strategy.root_device, 0), 0)
        progress.increment_ready()
        logged.on_batch_start(batch)
        if self.call("on_train_batch_start", batch, number) == -1:  # the module skips the rest of the epoch
            progress.increment_by(0, is_last_batch=True)
            progress.increment_processed()
            raise StopIteration
        progress.increment_started()

        optimizer = trainer.optimizers[0]
        outputs: dict[str, Tensor] = {}

        def forward_and_backward() -> Tensor:
            vars(task)["_current_fx_name"] = "training_step"
            with part("[Strategy].training_step"), torch.enable_grad():
                loss = strategy.training_step(batch, number)
            assert isinstance(loss, Tensor)
            steps.zero_grad.increment_ready()
            self.call("on_before_zero_grad", optimizer)
            steps.zero_grad.increment_started()
            task.optimizer_zero_grad(trainer.current_epoch, number, optimizer)
            steps.zero_grad.increment_completed()
            outputs["loss"] = loss.detach()
            if self.is_direct:
                self.backward(loss, optimizer)
            else:
                strategy.backward(loss, optimizer)
            return outputs["loss"]

        steps.step.increment_ready()
        with part("[LightningModule].optimizer_step"):
            if self.is_direct:
                optimizer.step(closure=forward_and_backward)  # type: ignore[arg-type]
            else:
                strategy.optimizer_step(optimizer, forward_and_backward, task)
        steps.step.increment_completed()
        progress.increment_processed()
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)

        self.call("on_train_batch_end", outputs, batch, number)
        if self._results:
            logged.on_batch_end()
        progress.increment_completed()
        if self._results:
            logged.update_train_step_metrics()

    def backward(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Run the backward pass and everything between it and the optimizer step."""
        trainer, task = self.trainer, self.trainer.lightning_module
        self.call("on_before_backward", loss)
        with trainer.profiler.profile("[Strategy].backward"):  # type: ignore[attr-defined]
            trainer.precision_plugin.backward(loss, task, optimizer)
        self.call("on_after_backward")
        self.call("on_before_optimizer_step", optimizer)
        if trainer.gradient_clip_val is not None:
            task.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)


def is_direct(trainer: Trainer) -> bool:
    """Return whether neither the strategy nor the precision plugin changes the optimizer step."""
    return isinstance(trainer.strategy, SingleDeviceStrategy) and not uses_grad_scaler(trainer)


def is_plain(trainer: Trainer) -> bool:
    """Return whether a batch is one step of one optimizer, and no hook of the project's tasks is overridden."""
    task = trainer.lightning_module
    usual = isinstance(task, Task) and not (
        is_overridden(task, "training_step", Task)
        or is_overridden(task, "optimizer_zero_grad", Task)
        or is_overridden(task, "optimizer_step", LightningModule)
        or is_overridden(task, "configure_gradient_clipping", LightningModule)
    )
    one = len(trainer.optimizers) == 1 and trainer.accumulate_grad_batches == 1
    return task.automatic_optimization and usual and one and trainer.datamodule is not None  # type: ignore[attr-defined]
