"""A loss or a gradient that is not finite: the run says where it began, and ends; or leaves the step out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ablab.data.batch import Batch
from ablab.runs.outcome import Diverged
from ablab.tasks.task import Task


class NonFinite(L.Callback):
    """Ends a run whose loss or gradient is not finite, before the weights take the step; logs `train/gradient_norm`.

    With a gradient scaler (16-mixed), whose gradients overflow now and then on purpose, only the loss is looked at.

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
        self.batch: Batch | None = None
        self.buffers: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *rest: Any) -> None:
        self.batch = batch
        if self.skip:  # a norm's averages take part in a step that may have to be left out
            self.buffers = [buffer.clone() for buffer in pl_module.model.buffers()]  # type: ignore[union-attr]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, Task)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(get_total_norm(gradients))
        loss = float(pl_module.step_loss)
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        bad = not math.isfinite(loss) or (not scaled and not math.isfinite(norm))
        if not bad:
            self.lower_rate(optimizer)
            self.last = {"loss": loss, "gradient norm": norm, "learning rate": optimizer.param_groups[0]["lr"]}
        elif len(self.skipped) < self.skip:
            self.leave_out(trainer, pl_module)
        else:
            raise Diverged(self.report(trainer, pl_module, loss, norm))
        pl_module.observed["train/gradient_norm"] = norm
        if self.skip:
            pl_module.observed["train/skipped_steps"] = len(self.skipped)
            pl_module.observed["train/lr"] = optimizer.param_groups[0]["lr"]  # which may be lower than the schedule's

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.batch, self.buffers = None, []

    def leave_out(self, trainer: L.Trainer, task: Task) -> None:
        """Take no step: parameters without gradients stay as they are, and the norms' averages get their old values."""
        self.skipped.append(trainer.global_step)
        for parameter in task.parameters():
            parameter.grad = None
        for buffer, old in zip(task.model.buffers(), self.buffers, strict=True):
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

    def report(self, trainer: L.Trainer, task: Task, loss: float, norm: float) -> str:
        """What is not finite, where it begins, what the last good step was, and what may help."""
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g}, its gradient {norm}"
        last = ", ".join(f"{name} {value:.4g}" for name, value in self.last.items()) or "none: it was the first"
        group = trainer.optimizers[0].param_groups[0]
        rate = group.get("initial_lr", group["lr"])
        return (
            f"step {trainer.global_step} (epoch {trainer.current_epoch}): {what}; {self.where(task)}.\n"
            f"  The last finite step had {last}.\n"
            f"  What often helps: a lower rate (optimizer.lr={0.3 * rate:.1g}), trainer.gradient_clip_val=1.0, "
            "scheduler.warmup_steps=100; or leaving such steps out, callbacks.nonfinite.skip=3"
        )

    def where(self, task: Task) -> str:
        """The first module of the forward pass whose output is not finite, or the last whose gradient is not."""
        assert self.batch is not None
        if not finite(self.batch.inputs):
            return "its inputs are not finite"
        task.derive_random_numbers()  # dropout as it was
        with first_non_finite(task.model) as found, torch.no_grad():
            for part in self.batch.parts(task.micro_batch_size):
                task(part)
        if found:
            return f"the first output that is not finite is that of {found[0]}"
        names = [n for n, p in task.named_parameters() if p.grad is not None and not finite(p.grad)]
        if not names:
            return "all outputs and gradients of this process are finite"
        return f"all outputs are finite, and the first gradient that is not is that of {names[-1]}"

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.last = list(state_dict["skipped"]), dict(state_dict["last"])


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
