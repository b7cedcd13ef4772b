"""Stop a run, or skip a step, when the loss or gradient is not finite, and report where the problem started."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ablab.data.rng import seed_step
from ablab.errors import Diverged
from ablab.tasks.async_copy import AsyncCopy
from ablab.tasks.task import Task, no_grad_sync, uses_grad_scaler


@dataclass
class PendingStep:
    """A step whose loss and gradient norm, possibly still being copied to the CPU, have not been checked yet."""

    step: int
    epoch: int
    batch: Any
    lr: float
    values: AsyncCopy


class NonFinite(L.Callback):
    """Stop a run before an update with a non-finite loss or gradient, and log `train/gradient_norm`.

    On a GPU with a fused optimizer, which skips such an update itself through `found_inf`, the check does not
    synchronize: it runs one step later, with the weights unchanged, and always before they are saved. With a gradient
    scaler (16-mixed), whose gradients overflow by design, only the loss is checked.

    Args:
        skip: number of non-finite steps per run to skip, leaving weights, running averages and optimizer state
            unchanged, before the run is stopped.
        lr_factor: factor on the learning rate for the rest of the run, applied once per skipped step.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, *, skip: int = 0, lr_factor: float = 1.0) -> None:
        if skip < 0:
            raise ValueError(f"skip={skip}: 0 or more steps can be left out")
        if not 0 < lr_factor <= 1:
            raise ValueError(f"lr_factor={lr_factor}: a factor above 0 and at most 1 is needed")
        self.skip = skip
        self.lr_factor = lr_factor
        self.skipped: list[int] = []
        self.last: dict[str, float] = {}
        self.batch: Any = None
        self.loss: Tensor | None = None  # for LightningModules that are not a `Task`
        self.buffers: list[Tensor] = []
        self.pending: PendingStep | None = None
        self.task: L.LightningModule | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.task = pl_module

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not isinstance(pl_module, Task):
            self.loss = loss.detach()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any) -> None:
        self.batch = batch
        if self.skip:  # to restore running averages if the step is skipped
            self.buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.check_pending()  # the previous step
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:  # `training_step` returned None, which skips the step
            return
        norm = get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        sharded = isinstance(norm, DTensor)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        observed = pl_module.observed if isinstance(pl_module, Task) else {}
        observed["train/gradient_norm"] = norm
        loss = pl_module.step_loss if isinstance(pl_module, Task) else self.loss
        # with a manual backward pass the loss is unknown
        values = torch.stack([torch.zeros_like(norm) if loss is None else loss.to(norm.dtype), norm])
        lr = optimizer.param_groups[0]["lr"]
        self.pending = PendingStep(trainer.global_step, trainer.current_epoch, self.batch, lr, AsyncCopy(values))
        if norm.is_cuda and not sharded and self.can_defer_check(optimizer):
            if not uses_grad_scaler(trainer):  # a scaler sets found_inf itself
                optimizer.found_inf = (~values.isfinite().all()).float()
        elif self.check_pending():
            self.lower_lr(optimizer)
            self.last["learning rate"] = optimizer.param_groups[0]["lr"]
        if self.skip:
            observed["train/skipped_steps"] = len(self.skipped)
            observed["train/lr"] = optimizer.param_groups[0]["lr"]  # may be lower than the scheduled value

    def can_defer_check(self, optimizer: Any) -> bool:
        """Return whether a step can be checked during the next one, because a non-finite step changes no weights."""
        return not self.skip and all(group.get("fused") for group in optimizer.param_groups)

    def check_pending(self) -> bool:
        """Check the pending step, if there is one.

        Returns:
            True if it is finite, False if it was skipped.

        Raises:
            Diverged: its loss or gradient is not finite, and no more steps may be skipped.
        """
        if self.pending is None:
            return True
        step, self.pending = self.pending, None
        assert self.task is not None
        loss, norm = step.values.values()
        if math.isfinite(loss) and (math.isfinite(norm) or uses_grad_scaler(self.task.trainer)):
            self.last = {"loss": loss, "gradient norm": norm, "learning rate": step.lr}
            return True
        if len(self.skipped) == self.skip:
            raise Diverged(self.error_message(self.task, step, loss, norm))
        self.skip_step(self.task)
        return False

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.batch, self.buffers = None, []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check_pending()

    def skip_step(self, task: L.LightningModule) -> None:
        """Skip the update: remove all gradients, and restore the running averages of norms."""
        self.skipped.append(task.trainer.global_step)
        for parameter in task.parameters():
            parameter.grad = None
        for buffer, old in zip(task.buffers(), self.buffers, strict=True):
            buffer.copy_(old)

    def lower_lr(self, optimizer: Any) -> None:
        """Lower the learning rate for this step only; the schedule is not changed."""
        if not self.skipped or self.lr_factor == 1:
            return
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.lr_factor ** len(self.skipped)

        def restore(*arguments: Any) -> None:
            handle.remove()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        handle = optimizer.register_step_post_hook(restore)

    def error_message(self, task: L.LightningModule, step: PendingStep, loss: float, norm: float) -> str:
        """Return the error message: what is not finite, where it starts, the last finite step, and remedies."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g}, its gradient {norm}"
        last = ", ".join(f"{name} {value:.4g}" for name, value in self.last.items()) or "none: it was the first"
        group = task.trainer.optimizers[0].param_groups[0]
        rate = group.get("initial_lr", group["lr"])
        where = self.locate(task, step) if isinstance(task, Task) else describe_gradients(task)
        return (
            f"step {step.step} (epoch {step.epoch}): {what}; {where}.\n"
            f"  The last finite step had {last}.\n"
            f"  What often helps: a lower rate (optimizer.lr={0.3 * rate:.1g}), trainer.gradient_clip_val=1.0, "
            "scheduler.warmup_steps=100; or leaving such steps out, callbacks.nonfinite.skip=3"
        )

    def locate(self, task: Task, step: PendingStep) -> str:
        """Repeat the step and name the first module with a non-finite output, or else with a non-finite gradient."""
        if not is_finite(step.batch.inputs):
            return "its inputs are not finite"
        later = task.trainer.global_step > step.step or self.batch is not step.batch
        task.train()  # with the same dropout; a validation may have started
        seed_step(task.seed, step.step, task.global_rank)
        if later:  # the gradients belong to a later step
            task.trainer.optimizers[0].zero_grad()
        with (
            record_non_finite(task.model) as places,
            torch.set_grad_enabled(later),
            no_grad_sync(task.trainer.strategy),
        ):
            for part in step.batch.parts(task.micro_batch_size):
                loss = task.loss(task(part), part)
                if later and not places:
                    loss.backward()
        if places:
            return f"the first output that is not finite is that of {places[0]}"
        return f"all outputs are finite, and {describe_gradients(task)}"

    def state_dict(self) -> dict[str, Any]:
        self.check_pending()  # never save a state that has not been checked
        return {"skipped": self.skipped, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.last = list(state_dict["skipped"]), dict(state_dict["last"])


def describe_gradients(module: nn.Module) -> str:
    """Describe the first non-finite gradient: that of the last parameter, since the backward pass starts there."""
    names = [n for n, p in module.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    return f"the first gradient that is not finite is that of {names[-1]}" if names else "all gradients are finite"


def is_finite(tensor: Tensor) -> bool:
    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # each process checks its shard
    return bool(here.isfinite().all())


@contextmanager
def record_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules with non-finite outputs, in the order of the forward pass."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(is_finite(t) for t in tensors if isinstance(t, Tensor) and t.is_floating_point()):
                found.append(f"model.{name}" if name else "model")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
