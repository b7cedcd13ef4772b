"""A loss or a gradient that is not finite: the run says where it began, and ends; or leaves the step out."""

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

from ablab.data.draws import seed_step
from ablab.errors import Diverged
from ablab.tasks.async_copy import AsyncCopy
from ablab.tasks.task import Task, no_grad_sync, uses_grad_scaler


@dataclass
class Found:
    """What a step had before its weights were to take it; `loss` and `norm` may still be on their way."""

    step: int
    epoch: int
    batch: Any
    lr: float
    values: AsyncCopy


class NonFinite(L.Callback):
    """Ends a run whose loss or gradient is not finite, before the weights take the step; logs `train/gradient_norm`.

    On a GPU, an optimizer that leaves such a step out by itself (those with `fused=true`) is not waited for: the run
    ends one step later, with the weights of before, and always before they are saved. With a gradient scaler
    (16-mixed), whose gradients overflow now and then on purpose, only the loss is looked at.

    Args:
        skip: this many such steps of a run are left out (weights, averages and schedule of momentum as if they had not
            been) before one ends it.
        lr_factor: after a step that was left out, the learning rate is multiplied by it for the rest of the run.

    Raises:
        ValueError: a value that makes no sense.
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
        self.loss: Tensor | None = None  # of a module that is no task of this project
        self.buffers: list[Tensor] = []
        self.pending: Found | None = None
        self.task: L.LightningModule | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.task = pl_module

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not isinstance(pl_module, Task):
            self.loss = loss.detach()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any) -> None:
        self.batch = batch
        if self.skip:  # a norm's averages take part in a step that may have to be left out
            self.buffers = [buffer.clone() for buffer in pl_module.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.settle()  # the step before this one
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:  # `training_step` has returned None, which leaves the step out
            return
        norm = get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
        sharded = isinstance(norm, DTensor)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        observed = pl_module.observed if isinstance(pl_module, Task) else {}
        observed["train/gradient_norm"] = norm
        loss = pl_module.step_loss if isinstance(pl_module, Task) else self.loss
        # a loss whose backward pass was not Lightning's is not known here
        values = torch.stack([torch.zeros_like(norm) if loss is None else loss.to(norm.dtype), norm])
        lr = optimizer.param_groups[0]["lr"]
        self.pending = Found(trainer.global_step, trainer.current_epoch, self.batch, lr, AsyncCopy(values))
        if norm.is_cuda and not sharded and self.can_wait(optimizer):
            if not uses_grad_scaler(trainer):  # whose scaler says it itself
                optimizer.found_inf = (~values.isfinite().all()).float()
        elif self.settle():
            self.lower_rate(optimizer)
            self.last["learning rate"] = optimizer.param_groups[0]["lr"]
        if self.skip:
            observed["train/skipped_steps"] = len(self.skipped)
            observed["train/lr"] = optimizer.param_groups[0]["lr"]  # which may be lower than the schedule's

    def can_wait(self, optimizer: Any) -> bool:
        """Whether the look at a step can wait until the next one: a bad one changes no weights."""
        return not self.skip and all(group.get("fused") for group in optimizer.param_groups)

    def settle(self) -> bool:
        """Look at the step that has not been looked at.

        Returns:
            whether it is good.

        Raises:
            Diverged: its loss or its gradient is not finite.
        """
        if self.pending is None:
            return True
        found, self.pending = self.pending, None
        assert self.task is not None
        loss, norm = found.values.values()
        if math.isfinite(loss) and (math.isfinite(norm) or uses_grad_scaler(self.task.trainer)):
            self.last = {"loss": loss, "gradient norm": norm, "learning rate": found.lr}
            return True
        if len(self.skipped) == self.skip:
            raise Diverged(self.report(self.task, found, loss, norm))
        self.leave_out(self.task)
        return False

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.batch, self.buffers = None, []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.settle()

    def leave_out(self, task: L.LightningModule) -> None:
        """Take no step: parameters without gradients stay as they are, and the norms' averages get their old values."""
        self.skipped.append(task.trainer.global_step)
        for parameter in task.parameters():
            parameter.grad = None
        for buffer, old in zip(task.buffers(), self.buffers, strict=True):
            buffer.copy_(old)

    def lower_rate(self, optimizer: Any) -> None:
        """Have this step taken with a lower rate; the schedule stays what it was."""
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

    def report(self, task: L.LightningModule, found: Found, loss: float, norm: float) -> str:
        """What is not finite, where it begins, what the last good step was, and what may help."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g}, its gradient {norm}"
        last = ", ".join(f"{name} {value:.4g}" for name, value in self.last.items()) or "none: it was the first"
        group = task.trainer.optimizers[0].param_groups[0]
        rate = group.get("initial_lr", group["lr"])
        where = self.where(task, found) if isinstance(task, Task) else bad_gradients(task)
        return (
            f"step {found.step} (epoch {found.epoch}): {what}; {where}.\n"
            f"  The last finite step had {last}.\n"
            f"  What often helps: a lower rate (optimizer.lr={0.3 * rate:.1g}), trainer.gradient_clip_val=1.0, "
            "scheduler.warmup_steps=100; or leaving such steps out, callbacks.nonfinite.skip=3"
        )

    def where(self, task: Task, found: Found) -> str:
        """The first module of the forward pass whose output is not finite, or the last whose gradient is not."""
        if not finite(found.batch.inputs):
            return "its inputs are not finite"
        later = task.trainer.global_step > found.step or self.batch is not found.batch
        task.train()  # as it was, like its dropout; a validation may have begun
        seed_step(task.seed, found.step, task.global_rank)
        if later:  # the gradients are another step's
            task.trainer.optimizers[0].zero_grad()
        with (
            first_non_finite(task.model) as places,
            torch.set_grad_enabled(later),
            no_grad_sync(task.trainer.strategy),
        ):
            for part in found.batch.parts(task.micro_batch_size):
                loss = task.loss(task(part), part)
                if later and not places:
                    loss.backward()
        if places:
            return f"the first output that is not finite is that of {places[0]}"
        return f"all outputs are finite, and {bad_gradients(task)}"

    def state_dict(self) -> dict[str, Any]:
        self.settle()  # nothing is saved that is not known to be finite
        return {"skipped": self.skipped, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.last = list(state_dict["skipped"]), dict(state_dict["last"])


def bad_gradients(module: nn.Module) -> str:
    """Return which gradient was not finite first: that of the last parameter, from where the backward pass came."""
    names = [n for n, p in module.named_parameters() if p.grad is not None and not finite(p.grad)]
    return f"the first gradient that is not finite is that of {names[-1]}" if names else "all gradients are finite"


def finite(tensor: Tensor) -> bool:
    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # each process looks for itself
    return bool(here.isfinite().all())


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose outputs are not finite, in the order in which they are computed."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(finite(t) for t in tensors if isinstance(t, Tensor) and t.is_floating_point()):
                found.append(f"model.{name}" if name else "model")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
