"""Everything of a run that can be wrong, tried without memory and before anything is written."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class
from lightning.pytorch.accelerators import AcceleratorRegistry
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ablab.config.build import blame, build
from ablab.config.errors import ConfigError, menu
from ablab.data.datamodule import DataModule
from ablab.norms import Norm, collecting, problems
from ablab.optim.optimizer import make_optimizer

SPAWNING = ("ddp_spawn", "ddp_fork", "ddp_notebook")
CONF = Path(__file__).parents[2] / "conf"


def dry_run(cfg: DictConfig, data: DataModule, norm: Norm, world_size: int) -> None:
    """Build model, optimizer and schedule on the meta device and pass one training batch through the model.

    Raises:
        ConfigError: what does not go together, with its place and the remedy.
    """
    check_sweep(world_size)
    check_kind(cfg, data)
    check_task(cfg, data)
    with blame("data"):
        batch = data.example(world_size)
        num_batches = len(data.train_dataloader())
    check_validation(cfg, num_batches)
    with torch.device("meta"), collecting():
        inputs = [part.to("meta") for part in (batch.inputs, batch.valid) if part is not None]
        model = build(cfg.model, norm=norm, **data.model_sizes)
        with named_errors(model):
            found = problems(model, norm, lambda: model(*inputs), num_processes=world_size)
        if found:
            fitting = [name for name, other in norms() if fits(other, cfg, data, inputs, world_size)]
            raise ConfigError(report(found, fitting))
        with blame("optimizer"):
            optimizer = make_optimizer(build(cfg.optimizer), model)
        with blame("scheduler"):
            build(cfg.scheduler)(optimizer, 1000)


def report(found: dict[str, list[str]], fitting: list[str]) -> str:
    """All that is wrong with the norms of a model, where, and which norms would fit everywhere."""
    lines = []
    for reason, names in found.items():
        shown = names if len(names) <= 6 else [*names[:3], f"{len(names) - 4} more", names[-1]]
        lines.append(f"norm: {reason} (at {', '.join(shown)} of the model)")
    if fitting:
        lines.append(f"norm: defined everywhere in this model, as they are: {', '.join(fitting)}")
    return "\n".join(lines)


def fits(norm: Norm, cfg: DictConfig, data: DataModule, inputs: list[torch.Tensor], world_size: int) -> bool:
    """Whether a model can be built and trained with another norm."""
    model = build(cfg.model, norm=norm, **data.model_sizes)
    return not problems(model, norm, lambda: model(*inputs), num_processes=world_size)


def norms() -> Iterator[tuple[str, Norm]]:
    """Every choice of conf/norm, with its name."""
    for file in sorted((CONF / "norm").glob("*.yaml")):
        yield file.stem, build(settings(file))


def settings(file: Path) -> DictConfig:
    """The keys of a YAML, of those of its folder that it builds upon, and of the weight that it chooses."""
    own: Any = OmegaConf.load(file)
    parts: list[Any] = []
    for entry in own.pop("defaults"):
        if isinstance(entry, str):
            parts.append(own if entry == "_self_" else settings(file.with_stem(entry)))
        else:  # weight: …, or override weight: …
            [choice] = entry.values()
            parts.append(OmegaConf.create({"weight": OmegaConf.load(file.parent / "weight" / f"{choice}.yaml")}))
    merged: Any = OmegaConf.merge(*parts)
    return merged


def check_trainer(cfg: DictConfig) -> None:
    """Refuse what Lightning would take and stumble over later, and an accelerator that this machine does not have."""
    trainer = cfg.trainer
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigError("trainer.max_epochs=-1, trainer.max_steps=-1: a schedule needs an end; set one of them")
    if trainer.get("accumulate_grad_batches", 1) != 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: data.batch_size is the batch of a "
            "step; where it does not fit, data.micro_batch_size takes it in parts"
        )
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val <= 0:
        raise ConfigError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: a norm above 0 is needed, or null for no limit"
        )
    if trainer.get("sync_batchnorm"):
        raise ConfigError(
            "trainer.sync_batchnorm=true: it converts torch's own layers and would leave this project's as they are; "
            "choose norm=syncbatchnorm, or norm.sync=true"
        )
    if trainer.max_epochs is None:
        raise ConfigError("trainer.max_epochs=null: say how many, or -1 for no limit beside trainer.max_steps")
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"):
        if trainer[name] is not None and trainer[name] <= 0:
            raise ConfigError(f"trainer.{name}={trainer[name]}: more than 0 is needed")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise ConfigError(f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}: at least 1 is needed")
    if trainer.strategy in SPAWNING:
        raise ConfigError(
            f"trainer.strategy={trainer.strategy}: what its processes find, the best checkpoint too, stays with them; "
            "choose trainer.strategy=ddp"
        )
    name = str(trainer.accelerator)
    if name == "auto":
        return
    known = sorted(AcceleratorRegistry.available_accelerators())
    if name == "gpu":
        available = any(AcceleratorRegistry[gpu]["accelerator"].is_available() for gpu in ("cuda", "mps"))
    elif name in known:
        available = AcceleratorRegistry[name]["accelerator"].is_available()
    else:
        raise ConfigError(f"trainer.accelerator={name}: there is no such accelerator; {menu(name, known, 'lightning')}")
    if not available:
        raise ConfigError(
            f"trainer.accelerator={name}: this machine has none, or torch cannot see it; choose trainer=cpu"
        )


def check_sweep(world_size: int) -> None:
    """Refuse runs of several processes in a sweep: what the launcher of one leaves behind would reach into the next."""
    if world_size > 1 and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError(
            f"trainer: {world_size} processes for each run of a sweep (-m) are not supported yet; "
            "start one command a run"
        )


@contextmanager
def named_errors(model: nn.Module) -> Iterator[None]:
    """Say in which module of the model a refused value was met."""
    inside = ["model"]

    def enter(name: str) -> Any:
        return lambda module, arguments: inside.append(f"model.{name}")

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(lambda module, arguments, output: inside.pop() and None))
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{inside[-1]}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def check_kind(cfg: DictConfig, data: DataModule) -> None:
    """Refuse a model that reads another kind of data, and say what goes together."""
    model = get_class(cfg.model._target_)
    if data.kind in takes(model, data.kind):
        return
    fitting_data = [name for name, c in choices("data") if c.kind in takes(model, "")]
    fitting_models = [name for name, c in choices("model") if data.kind in takes(c, data.kind)]
    raise ConfigError(
        f"model: {model.__name__} reads {' or '.join(takes(model, ''))}, and {type(data).__name__} gives {data.kind}; "
        f"choose data={'|'.join(fitting_data)} for this model, or model={'|'.join(fitting_models)} for this data"
    )


def check_task(cfg: DictConfig, data: DataModule) -> None:
    """Refuse a task that is not the data's, and a monitored metric that the task does not log."""
    task: Any = get_class(cfg.task._target_)
    if strange := set(data.task_sizes) - set(inspect.signature(task).parameters):
        raise ConfigError(
            f"task: {task.__name__} does not go with {type(data).__name__}, which gives {', '.join(sorted(strange))}; "
            "leave task= out, the data chooses it"
        )
    metrics = [f"val/{name}" for name in task.monitorable]
    if cfg.monitor.metric not in metrics:
        raise ConfigError(
            f"monitor.metric={cfg.monitor.metric}: {menu(str(cfg.monitor.metric), metrics, task.__name__)}"
        )
    better = task.monitorable[cfg.monitor.metric.removeprefix("val/")]
    if cfg.monitor.mode != better:
        raise ConfigError(
            f"monitor.mode={cfg.monitor.mode}: it would keep the worst {cfg.monitor.metric}; set monitor.mode={better}"
        )


def check_validation(cfg: DictConfig, num_batches: int) -> None:
    """Refuse a validation that would come after more batches than an epoch has."""
    every, limit = cfg.trainer.val_check_interval, cfg.trainer.limit_train_batches
    in_epoch = min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)
    if isinstance(every, int) and cfg.trainer.check_val_every_n_epoch is not None and every > in_epoch > 0:
        raise ConfigError(
            f"trainer.val_check_interval={every}: an epoch has {in_epoch} batches; choose fewer, "
            "or count through epochs with trainer.check_val_every_n_epoch=null"
        )


def takes(model: type, otherwise: str) -> tuple[str, ...]:
    """The kinds of data that a model says it reads; one that says nothing is let pass."""
    return getattr(model, "takes", (otherwise,))


def choices(group: str) -> Iterator[tuple[str, Any]]:
    """The YAMLs of a group, each with the class that it names."""
    for file in sorted((CONF / group).glob("*.yaml")):
        yield file.stem, get_class(target(file))


def target(file: Path) -> str:
    """What a YAML names as `_target_`, or the one of its folder that it builds upon."""
    own: Any = OmegaConf.load(file)
    if "_target_" in own:
        return own._target_
    [parent] = [entry for entry in own.defaults if isinstance(entry, str) and "@" not in entry and entry != "_self_"]
    return target(file.with_stem(parent))
