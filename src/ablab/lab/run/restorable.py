"""Check a checkpoint's state against the task and the trainer that are to take it, before either is changed.

A hash says that a file is what was written, not that this code can resume from it: the code may have changed, and a
hash is not a signature. Lightning and torch would find out in the middle of restoring, or at the first step.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ablab.data.datamodule import DataModule
from ablab.lab.launch.strategies import Sharded
from ablab.lab.run.checkpoint_files import PHASES, place, weights_problem
from ablab.optim.optimizer import make_optimizer
from ablab.optim.schedules import lr_scheduler_config
from ablab.tasks.metric_state import metric_states
from ablab.tasks.task import Task, is_overridden


class Unfit(ValueError):
    """A state that the code cannot resume from: where in it, and why."""


def check_state(path: Path, state: Any, *, task: Task, trainer: L.Trainer, data: DataModule) -> None:
    """Refuse a state that does not fit; task, trainer and data stay as they are.

    Args:
        path: the checkpoint's, whose name says its step and phase.
        state: its content.
        task, trainer, data: as they are built, before `fit`.

    Raises:
        Unfit: what in the state does not fit, and why.
    """
    step, phase = place(path)
    check_form(state, trainer, {type(data).__qualname__: data.state_dict()})
    loops, own = state["loops"]["fit_loop"], state["callbacks"]["Checkpoints"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if not task.automatic_optimization:
        steps = loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    if (state["global_step"], own["phase"]) != (step, PHASES[phase]) or steps != step:
        raise Unfit(f"it is of step {state['global_step']} ({own['phase']}, {steps} completed), unlike its name")
    best = own.get("best_score", "missing")
    if not (best is None or (isinstance(best, int | float) and best == best)):
        raise Unfit(f"callbacks.Checkpoints.best_score is {best!r}, and a number or None is needed")
    loaders = loops["state_dict"].get("combined_loader", [])
    if not isinstance(loaders, list) or not all(isinstance(loader, dict) for loader in loaders):
        raise Unfit("loops.fit_loop.state_dict.combined_loader is no list of mappings")

    weights = task.state_dict()
    for key in {"state_dict", "current_model_state"} & state.keys():  # with averaged weights, the raw ones are beside
        if (problem := weights_problem(state[key], weights)) is not None:
            raise Unfit(f"{key}: {problem}")
    check_callbacks(trainer, state)
    if (saved := state.get("train_metrics")) is not None:
        here = metric_states(task.metrics("train"))
        if not isinstance(saved, list) or not saved:
            raise Unfit("train_metrics is no list with an entry for each process")
        for rank, process in enumerate(saved):
            check_like(process, here, f"train_metrics[{rank}]", counted=True, shapes=True)
    if type(task).configure_optimizers is Task.configure_optimizers and not isinstance(trainer.strategy, Sharded):
        check_optimizers(task, state)


def check_guest_state(path: Path, state: Any, *, module: L.LightningModule, trainer: L.Trainer) -> None:
    """Refuse a state that does not fit a LightningModule from outside; module and trainer stay as they are.

    Its optimizers are left to Lightning: only the module itself can make them.

    Raises:
        Unfit: what in the state does not fit, and why.
    """
    step, phase = place(path)
    check_form(state, trainer, {"exact": {"processes": []}})
    own = state["callbacks"]["Checkpoints"]
    if (state["global_step"], own["phase"]) != (step, PHASES[phase]):
        raise Unfit(f"it is of step {state['global_step']} ({own['phase']}), unlike its name")
    if not state["exact"]["processes"]:
        raise Unfit("exact.processes is empty, and an entry for each process is needed")
    found, expected = state["state_dict"], module.state_dict()
    hooks = ("setup", "configure_model", "on_save_checkpoint")
    if not module.strict_loading or any(is_overridden(module, hook, L.LightningModule) for hook in hooks):
        common = found.keys() & expected.keys()  # layers may be made later, or left out on purpose
        found, expected = ({name: weights[name] for name in common} for weights in (found, expected))
    if (problem := weights_problem(found, expected)) is not None:
        raise Unfit(f"state_dict: {problem}")
    check_callbacks(trainer, state)


def check_form(state: Any, trainer: L.Trainer, own: dict[str, Any]) -> None:
    """Refuse a state that lacks what every checkpoint of a run has, or what `own` has beside it.

    Raises:
        Unfit: the place of the value, what is there, and what is needed.
    """
    fit_loop: Any = trainer.fit_loop.state_dict()
    expected = {
        "epoch": 0,
        "global_step": 0,
        "num_rows": 0,
        "state_dict": {},
        "callbacks": {"Checkpoints": {"phase": ""}},
        "loops": {"fit_loop": fit_loop},
        **own,
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    check_like(state, expected, "", counted=True)


def check_callbacks(trainer: L.Trainer, state: Any) -> None:
    """Refuse what one of the trainer's callbacks could not load."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in state["callbacks"]:
            check_callback(callback, state["callbacks"][callback.state_key])


def check_callback(callback: L.Callback, saved: Any) -> None:
    """Refuse what one of this project's callbacks could not load.

    A user's callback is left to Lightning: it may make what it keeps in `setup`, which has not been called yet.
    """
    if not type(callback).__module__.startswith(f"{__package__}."):
        return
    name = f"callbacks.{callback.state_key}"
    check_like(saved, callback.state_dict(), name)
    try:
        with warnings.catch_warnings(action="ignore"):
            copy.deepcopy(callback).load_state_dict(copy.deepcopy(saved))
    except Exception as error:
        raise Unfit(f"{name} cannot be loaded ({type(error).__name__}: {error})") from error


def check_optimizers(task: Task, state: Mapping[str, Any]) -> None:
    """Refuse the states of optimizers and schedules unlike those that the task would make."""
    parts = task.trained_parts()
    found = [len(state[name]) for name in ("optimizer_states", "lr_schedulers")]
    if found != [len(parts)] * 2:
        raise Unfit(f"it has {found[0]} optimizers and {found[1]} schedules, and {len(parts)} each is needed")
    for number, part in enumerate(parts):
        check_optimizer(task, part, state, number)


def check_optimizer(task: Task, part: nn.Module, state: Mapping[str, Any], number: int) -> None:
    """Refuse the states of the optimizer and the schedule of a part unlike those that the task would make.

    These are made on the meta device, where a step costs nothing, and shows what the optimizer keeps of a parameter.
    An optimizer that cannot do that is not checked.
    """
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        try:
            optimizer = make_optimizer(task.optimizer_factory, on_meta(part))
            total_steps = max(1000, state["global_step"])
            schedule = lr_scheduler_config(task.scheduler_factory, optimizer, total_steps)["scheduler"]
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            getattr(optimizer, "train", lambda: None)()  # of a schedule-free one, before a step
            optimizer.step()
        except Exception:  # whatever an optimizer of somebody's needs that is not there
            return
    found, expected = state["optimizer_states"][number], optimizer.state_dict()
    at = f"optimizer_states[{number}]"
    check_like(found, {"state": {}, "param_groups": []}, at)
    groups = found["param_groups"]
    num_groups = len(expected["param_groups"])
    if len(groups) != num_groups or not all(isinstance(group, Mapping) for group in groups):
        raise Unfit(f"{at}.param_groups is {groups!r:.60}, and a list of {num_groups} is needed")
    wanted = [  # another version of torch may add a key, and fills it in itself
        {key: value for key, value in new.items() if key in old or key in ("params", "lr")}
        for new, old in zip(expected["param_groups"], groups, strict=True)
    ]
    check_like(groups, wanted, f"{at}.param_groups", lengths=True)
    # what is below a mapping may depend on the number of steps, which is not known here: MultiStepLR's milestones
    plan = {key: {} if isinstance(value, Mapping) else value for key, value in schedule.state_dict().items()}
    check_like(state["lr_schedulers"][number], plan, f"lr_schedulers[{number}]", lengths=True)
    for index, values in found["state"].items():
        where = f"{at}.state[{index}]"
        if index not in expected["state"]:
            raise Unfit(f"{where} is of a parameter that the model does not have")
        check_like(values, expected["state"][index], where, shapes=True)


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have no memory."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def check_like(
    found: Any, expected: Any, where: str, *, counted: bool = False, lengths: bool = False, shapes: bool = False
) -> None:
    """Refuse a value of another type than the expected one, or a mapping that lacks one of its keys.

    Args:
        found: the value.
        expected: a value of the right form. None says nothing of it.
        where: the place of the value, for the message.
        counted: whole numbers are counts, and not negative.
        lengths: lists have the same length, and their items the same form.
        shapes: tensors have the same shape.

    Raises:
        Unfit: the place, what is there, and what is needed.
    """
    options = {"counted": counted, "lengths": lengths, "shapes": shapes}
    problem = None
    match expected:
        case Mapping():
            if not isinstance(found, Mapping):
                problem = "a mapping"
            else:
                for key, value in expected.items():
                    place = f"{where}.{key}" if where else str(key)
                    if key not in found:
                        raise Unfit(f"{place} is missing")
                    check_like(found[key], value, place, **options)
        case bool():
            problem = None if isinstance(found, bool) else "true or false"
        case int() if counted:
            is_count = isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63
            problem = None if is_count else "a whole number, 0 or more"
        case int() | float():
            is_number = isinstance(found, int | float) and not isinstance(found, bool)
            is_sound = is_number and (math.isfinite(found) or not math.isfinite(expected))
            problem = None if is_sound or isinstance(found, Tensor) else "a finite number"
        case Tensor() if shapes:
            fits = isinstance(found, Tensor) and found.shape == expected.shape
            problem = None if fits or found is None else f"a tensor of shape {tuple(expected.shape)}"
        case Tensor():
            problem = None if isinstance(found, Tensor | int | float) else "a tensor"
        case list() | tuple():
            if not isinstance(found, list | tuple):
                problem = "a list"
            elif lengths and len(found) != len(expected):
                problem = f"a list of {len(expected)}"
            elif lengths:
                for i, (item, value) in enumerate(zip(found, expected, strict=True)):
                    check_like(item, value, f"{where}[{i}]", **options)
        case str():
            problem = None if isinstance(found, str) else "a text"
    if problem is not None:
        shown = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.60}"
        raise Unfit(f"{where or 'its content'} is {shown}, and {problem} is needed")
