"""Check a checkpoint against the task and trainer that will load it, before either changes.

A matching hash shows that a file is intact, not that this code can resume from it: the code may have changed, and a
hash is not a signature. Lightning and torch would fail halfway through loading, or at the first step.
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
from ablab.lab.run.checkpoint_files import PHASES, step_and_phase, weights_problem
from ablab.optim.optimizer import make_optimizer
from ablab.optim.schedules import lr_scheduler_config
from ablab.tasks.metric_state import metric_states
from ablab.tasks.task import Task, is_overridden


class Unfit(ValueError):
    """A checkpoint that the code cannot resume from; the message names the entry and the reason."""


def check_checkpoint(path: Path, state: Any, *, task: Task, trainer: L.Trainer, data: DataModule) -> None:
    """Refuse a checkpoint that does not fit; task, trainer and data stay unchanged.

    Args:
        path: the path of the checkpoint, whose name has its step and phase.
        state: the content of the checkpoint.
        task, trainer, data: as built, before `fit`.

    Raises:
        Unfit: names the entry that does not fit, and the reason.
    """
    step, phase = step_and_phase(path)
    check_structure(state, trainer, {type(data).__qualname__: data.state_dict()})
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
    for key in {"state_dict", "current_model_state"} & state.keys():  # averaged weights are stored beside the raw ones
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


def check_guest_checkpoint(path: Path, state: Any, *, module: L.LightningModule, trainer: L.Trainer) -> None:
    """Refuse a checkpoint that does not fit an external LightningModule; module and trainer stay unchanged.

    Its optimizers are left to Lightning: only the module itself can build them.

    Raises:
        Unfit: names the entry that does not fit, and the reason.
    """
    step, phase = step_and_phase(path)
    check_structure(state, trainer, {"exact": {"processes": []}})
    own = state["callbacks"]["Checkpoints"]
    if (state["global_step"], own["phase"]) != (step, PHASES[phase]):
        raise Unfit(f"it is of step {state['global_step']} ({own['phase']}), unlike its name")
    if not state["exact"]["processes"]:
        raise Unfit("exact.processes is empty, and an entry for each process is needed")
    found, expected = state["state_dict"], module.state_dict()
    hooks = ("setup", "configure_model", "on_save_checkpoint")
    if not module.strict_loading or any(is_overridden(module, hook, L.LightningModule) for hook in hooks):
        common = found.keys() & expected.keys()  # layers may be created later, or left out on purpose
        found, expected = ({name: weights[name] for name in common} for weights in (found, expected))
    if (problem := weights_problem(found, expected)) is not None:
        raise Unfit(f"state_dict: {problem}")
    check_callbacks(trainer, state)


def check_structure(state: Any, trainer: L.Trainer, own: dict[str, Any]) -> None:
    """Refuse a checkpoint without the entries that every checkpoint of a run has, or those of `own`.

    Raises:
        Unfit: names the entry, its value and the expected type.
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
    """Refuse a checkpoint that one of the trainer's callbacks could not load."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in state["callbacks"]:
            check_callback(callback, state["callbacks"][callback.state_key])


def check_callback(callback: L.Callback, saved: Any) -> None:
    """Refuse a state that one of this project's callbacks could not load.

    Other callbacks are left to Lightning: they may create their attributes in `setup`, which has not been called yet.
    """
    if type(callback).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return
    name = f"callbacks.{callback.state_key}"
    check_like(saved, callback.state_dict(), name)
    try:
        with warnings.catch_warnings(action="ignore"):
            copy.deepcopy(callback).load_state_dict(copy.deepcopy(saved))
    except Exception as error:
        raise Unfit(f"{name} cannot be loaded ({type(error).__name__}: {error})") from error


def check_optimizers(task: Task, state: Mapping[str, Any]) -> None:
    """Refuse optimizer and schedule states that differ in form from those of the task."""
    parts = task.trained_parts()
    found = [len(state[name]) for name in ("optimizer_states", "lr_schedulers")]
    if found != [len(parts)] * 2:
        raise Unfit(f"it has {found[0]} optimizers and {found[1]} schedules, and {len(parts)} each is needed")
    for number, part in enumerate(parts):
        check_optimizer(task, part, state, number)


def check_optimizer(task: Task, part: nn.Module, state: Mapping[str, Any], number: int) -> None:
    """Refuse optimizer and schedule states of one part that differ in form from those of the task.

    The expected states come from one step on the meta device, which costs nothing. An optimizer that cannot run there
    is not checked.
    """
    with warnings.catch_warnings(action="ignore"), torch.device("meta"):
        try:
            optimizer = make_optimizer(task.optimizer_factory, copy_to_meta(part))
            total_steps = max(1000, state["global_step"])
            schedule = lr_scheduler_config(task.scheduler_factory, optimizer, total_steps)["scheduler"]
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            getattr(optimizer, "train", lambda: None)()  # schedule-free optimizers need it before a step
            optimizer.step()
        except Exception:  # external optimizers may need real tensors
            return
    found, expected = state["optimizer_states"][number], optimizer.state_dict()
    at = f"optimizer_states[{number}]"
    check_like(found, {"state": {}, "param_groups": []}, at)
    groups = found["param_groups"]
    num_groups = len(expected["param_groups"])
    if len(groups) != num_groups or not all(isinstance(group, Mapping) for group in groups):
        raise Unfit(f"{at}.param_groups is {groups!r:.60}, and a list of {num_groups} is needed")
    wanted = [  # other versions of torch add keys and fill in missing ones
        {key: value for key, value in new.items() if key in old or key in ("params", "lr")}
        for new, old in zip(expected["param_groups"], groups, strict=True)
    ]
    check_like(groups, wanted, f"{at}.param_groups", lengths=True)
    # nested mappings may depend on the number of steps, unknown here: MultiStepLR's milestones
    plan = {key: {} if isinstance(value, Mapping) else value for key, value in schedule.state_dict().items()}
    check_like(state["lr_schedulers"][number], plan, f"lr_schedulers[{number}]", lengths=True)
    for index, values in found["state"].items():
        where = f"{at}.state[{index}]"
        if index not in expected["state"]:
            raise Unfit(f"{where} is of a parameter that the model does not have")
        check_like(values, expected["state"][index], where, shapes=True)


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device."""
    memo: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def check_like(
    found: Any, expected: Any, where: str, *, counted: bool = False, lengths: bool = False, shapes: bool = False
) -> None:
    """Refuse a value of another type than expected, or a mapping that lacks a key.

    Args:
        found: the value.
        expected: a value of the right form. None accepts anything.
        where: the path of the value, for the message.
        counted: integers are counts, and not negative.
        lengths: lists have the same length, and items of the same form.
        shapes: tensors have the same shape.

    Raises:
        Unfit: names the entry, its value and the expected type.
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
