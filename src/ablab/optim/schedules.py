"""Learning rate schedules, each a function of (optimizer, total steps).

A schedule returns a torch scheduler, which is stepped after each optimizer step, or an `EpochScheduler`, which is
stepped after each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau


@dataclass(frozen=True)
class EpochScheduler:
    """A torch scheduler that is stepped after each epoch.

    Args:
        scheduler: the torch scheduler.
        monitor: the logged metric to pass to its `step`, for ReduceLROnPlateau.
    """

    scheduler: LRScheduler
    monitor: str | None = None


def lr_scheduler_config(schedule: Callable[..., Any], optimizer: Optimizer, total_steps: int) -> dict[str, Any]:
    """Return the `lr_scheduler` entry of Lightning's `configure_optimizers`.

    Args:
        schedule: a schedule, for example `functools.partial(cosine, warmup_steps=20)`.
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run.
    """
    scheduler = schedule(optimizer, total_steps)
    if not isinstance(scheduler, EpochScheduler):
        return {"scheduler": scheduler, "interval": "step"}
    monitor = {} if scheduler.monitor is None else {"monitor": scheduler.monitor}
    return {"scheduler": scheduler.scheduler, "interval": "epoch", **monitor}


def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LambdaLR:
    """Keep lr constant, after a linear warmup from 0.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run; not used.
        warmup_steps: steps of linear warmup.
    """
    check_warmup(warmup_steps)
    return LambdaLR(optimizer, lambda step: warmup(step, warmup_steps))


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, final_ratio: float = 0.0) -> LambdaLR:
    """Warm up linearly to lr, then anneal along half a cosine to `final_ratio` · lr at the last step.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warmup.
        final_ratio: final learning rate, as a fraction of lr.

    References:
        Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983 (without restarts)
    """
    check_warmup(warmup_steps)
    if not 0 <= final_ratio <= 1:
        raise ValueError(f"final_ratio={final_ratio}: the end is a share of lr, from 0 to 1")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup(step, warmup_steps)
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer, total_steps: int, *, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1
) -> LambdaLR:
    """Multiply lr by `gamma` at each milestone.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run.
        milestones: fractions of the run; 0.5 and 0.75 are the 32k and 48k of 64k steps of He et al. 2015.
        gamma: the factor at each milestone.
    """
    if any(not 0 < share < 1 for share in milestones):
        raise ValueError(f"milestones={list(milestones)}: they are shares of the run, between 0 and 1")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma={gamma}: a factor above 0 is needed, for example 0.1")
    steps = [round(share * total_steps) for share in milestones]
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= milestone for milestone in steps))


def one_cycle(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_ratio: float = 0.3,
    initial_ratio: float = 0.04,
    base_momentum: float | None = None,
) -> OneCycleLR:
    """Increase lr along a cosine, then decrease it to nearly 0 (torch's OneCycleLR).

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run.
        warmup_ratio: fraction of the steps in which lr increases.
        initial_ratio: initial learning rate, as a fraction of lr.
        base_momentum: cycle the momentum (Adam's first beta) inversely, from the optimizer's value down to this one and
            back; None keeps the momentum constant.

    References:
        Smith & Topin 2017, https://arxiv.org/abs/1708.07120
    """
    if not 0 < warmup_ratio < 1:
        raise ValueError(f"warmup_ratio={warmup_ratio}: the share of the run that climbs is between 0 and 1")
    if not 0 < initial_ratio <= 1:
        raise ValueError(f"initial_ratio={initial_ratio}: the start is a share of lr, more than 0 and at most 1")
    group = optimizer.param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
    if base_momentum is not None and not 0 <= base_momentum <= momentum:
        raise ValueError(
            f"base_momentum={base_momentum}: it is reached from the optimizer's own momentum, {momentum}, and is at "
            "most that; null leaves the momentum as it is"
        )
    if warmup_ratio * total_steps == 1:  # torch would divide by a warmup length of 0
        warmup_ratio *= 0.999
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=total_steps,
        pct_start=warmup_ratio,
        div_factor=1 / initial_ratio,
        cycle_momentum=base_momentum is not None,
        base_momentum=0.0 if base_momentum is None else base_momentum,
        max_momentum=momentum,
    )


def triangular(
    optimizer: Optimizer,
    total_steps: int,
    *,
    peak: float = 0.23,
    initial_ratio: float = 0.2,
    final_ratio: float = 0.07,
) -> LambdaLR:
    """Increase lr linearly, then decrease it linearly.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run.
        peak: fraction of the run at which lr is reached; with 0, lr only decreases.
        initial_ratio: initial learning rate, as a fraction of lr.
        final_ratio: final learning rate, as a fraction of lr.

    References:
        Jordan 2024, https://arxiv.org/abs/2404.00498
    """
    if not 0 <= peak < 1:
        raise ValueError(f"peak={peak}: a share of the run is needed, at least 0 and below 1")
    for name, ratio in (("initial_ratio", initial_ratio), ("final_ratio", final_ratio)):
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}={ratio}: a share of lr is needed, from 0 to 1")
    top = int(peak * total_steps)

    def factor(step: int) -> float:
        if step < top:
            return initial_ratio + (1 - initial_ratio) * step / top
        return 1 - (1 - final_ratio) * min(1.0, (step - top) / (total_steps - top))

    return LambdaLR(optimizer, factor)


def plateau(
    optimizer: Optimizer,
    total_steps: int,
    *,
    monitor: str,
    mode: Literal["min", "max"],
    factor: float = 0.1,
    patience: int = 5,
    threshold: float = 1e-4,
    min_lr: float = 0.0,
) -> EpochScheduler:
    """Multiply lr by `factor` when the monitored metric has stopped improving (torch's ReduceLROnPlateau).

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run; not used.
        monitor: a logged validation metric.
        mode: "min" if lower is better, "max" if higher is.
        factor: the factor of each reduction, between 0 and 1.
        patience: validations without improvement that are tolerated before a reduction.
        threshold: relative change of the metric that counts as an improvement.
        min_lr: lower bound of lr.

    Raises:
        ValueError: no metric is monitored, or a value is outside its range.
    """
    if monitor is None:
        raise ValueError("monitor=null: name a metric that the validation logs, for example monitor.metric=val/loss")
    if not 0 < factor < 1:
        raise ValueError(f"factor={factor}: use a factor between 0 and 1, for example 0.1")
    if patience < 0:
        raise ValueError(f"patience={patience}: use 0 or more validations")
    scheduler = ReduceLROnPlateau(
        optimizer, mode=mode, factor=factor, patience=patience, threshold=threshold, min_lr=min_lr
    )
    return EpochScheduler(scheduler, monitor)


def per_epoch(
    optimizer: Optimizer, total_steps: int, *, schedule: Callable[[Optimizer], LRScheduler]
) -> EpochScheduler:
    """Step any torch scheduler once per epoch.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        total_steps: optimizer steps of the whole run; not used.
        schedule: makes the scheduler from the optimizer.
    """
    return EpochScheduler(schedule(optimizer))


def warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def check_warmup(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps}: steps cannot be negative; 0 is no warmup")


def unblock_epoch_schedulers(trainer: Any) -> None:
    """Make the trainer step its per-epoch schedulers at the end of a resumed epoch, which Lightning skips.

    Sets the private attribute, not the property `restarting`: with `max_steps`, the property's setter would also mark
    the inner loops as restarting, and the next validation would resume where the last one ended.
    """
    trainer.fit_loop._restarting = False
