"""Checks of a run before anything is written: of its settings, and of one batch on the meta device."""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, get_object
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.errors import ConfigError
from ablab.lab.config.build import add_config_path, build
from ablab.lab.config.errors import menu
from ablab.lab.config.schema import is_guest, read_signature, show
from ablab.lab.config.yaml_files import CONF
from ablab.lab.launch.strategies import Sharded
from ablab.norms import Norm, collect_refusals, find_norm_problems
from ablab.optim.optimizer import make_optimizer
from ablab.optim.schedules import lr_scheduler_config
from ablab.rank import is_own_launch, launcher, torchrun_command
from ablab.tasks.task import Task, uses_grad_scaler

SPAWN_STRATEGIES = ("ddp_spawn", "ddp_fork", "ddp_notebook")
REQUIRED_KEYS = (
    *("accelerator", "strategy", "devices", "max_epochs", "max_steps", "gradient_clip_val", "log_every_n_steps"),
    *("val_check_interval", "check_val_every_n_epoch"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches"),
)


def dry_run(cfg: DictConfig, data: DataModule, norm: Norm, world_size: int) -> None:
    """Check that the parts of a config fit together, then pass one training batch through the model and the loss.

    The batch is on the meta device, which costs no memory and no time. Code that reads values, which meta tensors lack,
    gets a real batch. `dry_run=false` skips the batch.

    Raises:
        ConfigError: names the incompatible settings and the remedy.
    """
    check_task(cfg, data)
    check_callbacks(cfg)
    check_loggers(cfg)
    with add_config_path("data"):
        batch = data.example(world_size)
        num_batches = {part: len(getattr(data, f"{part}_dataloader")()) for part in ("train", "val", "test")}
    check_batch_shares(cfg, num_batches)
    check_validation(cfg, num_batches["train"])
    warn_of_short_training(cfg, num_batches["train"])
    if not cfg.dry_run:
        return
    try:
        with torch.device("meta"):
            pass_batch(cfg, data, norm, batch.on("meta"), world_size)
    except Exception as error:
        if (problem := kind_problem(cfg, data)) is not None:
            raise ConfigError(problem) from error
        if isinstance(error, ConfigError):
            raise
        with torch.random.fork_rng(devices=()):  # keeps the seed of the initial weights, drawn later
            pass_batch(cfg, data, norm, batch, world_size)


def pass_batch(cfg: DictConfig, data: DataModule, norm: Norm, batch: Batch, world_size: int) -> None:
    """Build model, task, optimizer and schedule, and compute the loss of one batch.

    Raises:
        ConfigError: names the part that does not fit.
    """
    with collect_refusals():
        model = build(cfg.model, norm=norm, **data.model_sizes)
        task = build_task(cfg, data, norm, model)
        outputs: list[Any] = []
        with name_failing_module(task.model):
            found = find_norm_problems(task.model, norm, lambda: outputs.append(task(batch)), num_processes=world_size)
        if found:
            fitting = [name for name, other in norm_choices() if fits_norm(other, cfg, data, batch, world_size)]
            raise ConfigError(format_norm_problems(found, fitting))
    if not task.overrides("training_step"):
        try:
            task.loss(outputs[0], batch)
        except (RuntimeError, ValueError, IndexError) as error:
            if batch.targets.is_meta:
                raise  # the loss may read values, which needs a real batch
            shapes = f"{tuple(outputs[0].shape)} from {type(model).__name__}, targets {tuple(batch.targets.shape)}"
            raise ConfigError(
                f"task: the loss of {type(task).__name__} fails on a batch of {type(data).__name__} ({error}); it was "
                f"given {shapes}"
            ) from error
    for part in task.trained_parts():
        with add_config_path("optimizer"):
            optimizer = make_optimizer(task.optimizer_factory, part)
        with add_config_path("scheduler"):
            schedule = lr_scheduler_config(task.scheduler_factory, optimizer, 1000)
        if "monitor" in schedule and not task.automatic_optimization:
            raise ConfigError(
                f"scheduler: it waits for {schedule['monitor']}, and {type(task).__name__} steps its schedules by "
                "itself, in its training step; choose scheduler=constant, or another of steps or epochs"
            )


def build_task(cfg: DictConfig, data: DataModule, norm: Norm, model: nn.Module) -> Task:
    """Build the task of a config around a model.

    The constructor gets the sizes of the data and, if its signature has them, the norm, the input shape and the number
    of training samples per class.

    Raises:
        ConfigError: the task refuses a value, the model, the data or an overridden method.
    """
    signature = read_signature(cfg.task._target_)
    given = {name: size for name, size in data.task_sizes.items() if name in signature.parameters or signature.open}
    if "class_counts" in signature.parameters:
        given["class_counts"] = data.training_class_counts()
    if "norm" in signature.parameters:
        given["norm"] = norm
    if "input_shape" in signature.parameters:
        given["input_shape"] = data.input_shape
    task: Task = build(
        cfg.task,
        model=model,
        optimizer=build(cfg.optimizer),
        scheduler=build(cfg.scheduler),
        micro_batch_size=data.micro_batch_size,
        seed=cfg.seed,
        **given,
    )
    with add_config_path("data"):
        task.check_data(data)
    with add_config_path("task"):
        task.check_overrides()
    usual = {"gradient_clip_val": None, "accumulate_grad_batches": 1}
    for name, value in usual.items():
        if not task.automatic_optimization and cfg.trainer.get(name, value) != value:
            raise ConfigError(
                f"trainer.{name}={cfg.trainer[name]}: {type(task).__name__} steps its optimizers by itself "
                "(automatic_optimization=False), and Lightning leaves their gradients alone; "
                f"set trainer.{name}={show(value)}"
            )
    return task


def format_norm_problems(found: dict[str, list[str]], fitting: list[str]) -> str:
    """Describe each problem with the norms of a model and where it occurs, and list the norms that would work."""
    lines = []
    for reason, names in found.items():
        shown = names if len(names) <= 6 else [*names[:3], f"{len(names) - 4} more", names[-1]]
        lines.append(f"norm: {reason} (at {', '.join(shown)} of the model)")
    if fitting:
        lines.append(f"norm: defined everywhere in this model, as they are: {', '.join(fitting)}")
    return "\n".join(lines)


def fits_norm(norm: Norm, cfg: DictConfig, data: DataModule, batch: Batch, world_size: int) -> bool:
    """Return whether the model can be built and trained with another norm."""
    task = build_task(cfg, data, norm, build(cfg.model, norm=norm, **data.model_sizes))
    return not find_norm_problems(task.model, norm, lambda: task(batch), num_processes=world_size)


def norm_choices() -> Iterator[tuple[str, Norm]]:
    """Yield the name and the norm of every choice in conf/norm."""
    for file in sorted((CONF / "norm").glob("*.yaml")):
        yield file.stem, build(load_norm_yaml(file))


def load_norm_yaml(file: Path) -> DictConfig:
    """Return the settings of a norm YAML, merged with the YAMLs that its defaults list names."""
    own: Any = OmegaConf.load(file)
    parts: list[Any] = []
    for entry in own.pop("defaults"):
        if isinstance(entry, str):
            parts.append(own if entry == "_self_" else load_norm_yaml(file.with_stem(entry)))
        else:  # an entry {"weight": choice} or {"override weight": choice}
            [choice] = entry.values()
            parts.append(OmegaConf.create({"weight": OmegaConf.load(file.parent / "weight" / f"{choice}.yaml")}))
    merged: Any = OmegaConf.merge(*parts)
    return merged


def check_trainer(cfg: DictConfig) -> None:
    """Refuse trainer settings that would fail later in Lightning, and accelerators that this machine lacks."""
    trainer = cfg.trainer
    for name in REQUIRED_KEYS:
        if name not in trainer:
            raise ConfigError(f"trainer.{name}: it is missing; a run needs one, so leave the ~trainer.{name} out")
    check_length(trainer)
    guest = is_guest(cfg)
    if cfg.optimizer is not None and cfg.optimizer.get("fused") and trainer.precision in ("16-mixed", "16", 16):
        raise ConfigError(
            f"optimizer.fused=true: with trainer.precision={trainer.precision} gradients are scaled until its step, so "
            "that nobody sees or clips them as they are; set optimizer.fused=false, or choose bf16-mixed"
        )
    check_intervals(trainer)
    if (number := trainer.get("accumulate_grad_batches", 1)) < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches={number}: use 1 or more batches")
    if number > 1 and not guest and cfg.data.micro_batch_size is not None:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={number}, data.micro_batch_size={cfg.data.micro_batch_size}: both split "
            "a step into several forward passes; set one of them"
        )
    if trainer.gradient_clip_val is not None and not 0 < trainer.gradient_clip_val < math.inf:
        raise ConfigError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val}: a norm above 0 is needed, or null for no limit"
        )
    if trainer.get("sync_batchnorm") and not guest:
        raise ConfigError(
            "trainer.sync_batchnorm=true: it converts torch's own layers and would leave this project's as they are; "
            "choose norm=syncbatchnorm, or norm.sync=true"
        )
    check_accelerator(trainer)
    check_processes(trainer)


def check_length(trainer: DictConfig) -> None:
    """Refuse a training run without steps or without an end."""
    if trainer.max_epochs is None:
        raise ConfigError("trainer.max_epochs=null: set an integer, or -1 together with trainer.max_steps")
    for name in ("max_epochs", "max_steps"):
        if trainer[name] < 1 and trainer[name] != -1:
            raise ConfigError(f"trainer.{name}={trainer[name]}: at least 1 is needed, or -1 for no limit")
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ConfigError("trainer.max_epochs=-1, trainer.max_steps=-1: a schedule needs an end; set one of them")


def check_intervals(trainer: DictConfig) -> None:
    """Refuse intervals and batch limits that are not positive, and fractions above 1."""
    for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "val_check_interval"):
        value = trainer[name]
        if isinstance(value, str):
            raise ConfigError(f"trainer.{name}={value}: a number of batches is needed, or a share of them")
        if value is not None and value <= 0:
            raise ConfigError(f"trainer.{name}={value}: more than 0 is needed")
        if isinstance(value, float) and value > 1:
            raise ConfigError(f"trainer.{name}={value}: a share is at most 1.0; a whole number counts batches")
    for name in ("fast_dev_run", "overfit_batches"):
        value = trainer.get(name) or 0
        if isinstance(value, str) or value < 0 or (isinstance(value, float) and value > 1):
            raise ConfigError(f"trainer.{name}={show(trainer[name])}: use a number of batches, or 0 to turn it off")
    for name in ("check_val_every_n_epoch", "log_every_n_steps"):
        if trainer[name] is not None and trainer[name] < 1:
            raise ConfigError(f"trainer.{name}={trainer[name]}: at least 1 is needed")
    if (trainer.get("num_sanity_val_steps") or 0) < -1:
        raise ConfigError(f"trainer.num_sanity_val_steps={trainer.num_sanity_val_steps}: 0 or more, or -1 for all")
    if trainer.check_val_every_n_epoch is None and not isinstance(trainer.val_check_interval, int):
        raise ConfigError(
            f"trainer.check_val_every_n_epoch=null: trainer.val_check_interval={show(trainer.val_check_interval)} then "
            "counts steps; give a whole number"
        )


def check_processes(trainer: DictConfig) -> None:
    """Refuse unknown strategies and invalid numbers of processes and machines."""
    if isinstance(trainer.strategy, str) and trainer.strategy in SPAWN_STRATEGIES:
        raise ConfigError(
            f"trainer.strategy={trainer.strategy}: what its processes find, the best checkpoint too, stays with them; "
            "choose trainer.strategy=ddp"
        )
    known = ["auto", *StrategyRegistry.available_strategies()]
    if not isinstance(trainer.strategy, DictConfig) and trainer.strategy not in known:
        raise ConfigError(
            f"trainer.strategy={show(trainer.strategy)}: there is no such strategy; "
            f"{menu(str(trainer.strategy), known, 'lightning')}"
        )
    devices, num_nodes = trainer.devices, trainer.get("num_nodes", 1)
    if trainer.accelerator == "cpu" and not (devices == "auto" or (str(devices).isdigit() and int(devices) > 0)):
        raise ConfigError(f"trainer.devices={show(devices)}: a number of processes is needed, at least 1")
    if str(devices) in ("0", "[]", ""):
        raise ConfigError(f"trainer.devices={show(devices)}: at least one is needed; auto is all that there are")
    if num_nodes < 1:
        raise ConfigError(f"trainer.num_nodes={num_nodes}: at least 1 machine is needed")


def check_accelerator(trainer: DictConfig) -> None:
    """Refuse an accelerator that this machine lacks, and a precision that the accelerator does not support."""
    name = str(trainer.accelerator)
    if name == "auto":
        return
    known = sorted({"gpu", *AcceleratorRegistry.available_accelerators()})
    if name == "gpu":
        available = any(AcceleratorRegistry[gpu]["accelerator"].is_available() for gpu in ("cuda", "mps"))
    elif name in known:
        available = AcceleratorRegistry[name]["accelerator"].is_available()
    else:
        raise ConfigError(
            f"trainer.accelerator={show(trainer.accelerator)}: there is no such accelerator; "
            f"{menu(name, known, 'lightning')}"
        )
    if not available:
        raise ConfigError(
            f"trainer.accelerator={name}: this machine has none, or torch cannot see it; choose trainer=cpu"
        )
    if name == "cpu" and trainer.get("precision") in ("16-mixed", "16", 16):
        raise ConfigError(f"trainer.precision={trainer.precision}: it is for GPUs; choose bf16-mixed or 32-true")


def check_start() -> None:
    """Refuse to run as one process of several without a launcher such as torchrun.

    Raises:
        ConfigError: names the torchrun command.
    """
    if (command := torchrun_command()) is not None:
        values = ", ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        raise ConfigError(
            f"{values}: they ask for one process of several, which torchrun has to start: {command}; "
            "to train in this process alone, unset RANK and WORLD_SIZE"
        )


def check_launcher(trainer: L.Trainer) -> None:
    """Refuse a sweep under an external launcher, and a world-size mismatch."""
    world_size = trainer.num_devices * trainer.num_nodes
    outside = launcher()
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if outside and not is_own_launch() and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ConfigError(
            f"-m under {outside}: each of its processes would do the whole sweep; a sweep starts the processes of each "
            "run itself, so leave it out: python train.py -m trainer=ddp"
        )
    started = int(os.environ.get("SLURM_STEP_NUM_TASKS" if outside == "srun" else "WORLD_SIZE", "1"))
    if outside and started != world_size:
        raise ConfigError(
            f"trainer.devices, trainer.num_nodes: they make {world_size} processes, and {outside} has started "
            f"{started}; give the processes of a machine and the machines"
        )
    if outside and environment is not None:
        with add_config_path("trainer"):
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)


def check_sharding(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Refuse callbacks that need the whole model, and scaled gradients, under FSDP."""
    if not isinstance(trainer.strategy, Sharded):
        return
    # imported here: runs without FSDP do not load them
    from ablab.callbacks.diagnostics.covariate_shift import CovariateShift
    from ablab.callbacks.diagnostics.diagnostic import Diagnostic
    from ablab.callbacks.lookahead import Lookahead

    for name, callback in cfg.callbacks.items():
        builder = None if callback is None else get_object(callback._target_)
        if isinstance(builder, type) and issubclass(builder, Diagnostic | CovariateShift | WeightAveraging | Lookahead):
            raise ConfigError(
                f"callbacks.{name}: it works on a copy of the model, and under trainer=fsdp each process has a part of "
                "it; choose trainer=ddp, or leave it out"
            )
    if uses_grad_scaler(trainer):
        raise ConfigError(f"trainer.precision={cfg.trainer.precision}: with trainer=fsdp, choose bf16-mixed")


@contextmanager
def name_failing_module(model: nn.Module) -> Iterator[None]:
    """Name the submodule in which a `ValueError` is raised."""
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


def kind_problem(cfg: DictConfig, data: DataModule) -> str | None:
    """Return the error for a model that takes another kind of input, with choices that fit; None if it fits."""
    model = get_object(cfg.model._target_)
    if data.kind in accepted_kinds(model, data.kind):
        return None
    fitting_data = [name for name, c in group_choices("data") if c.kind in accepted_kinds(model, "")]
    fitting_models = [name for name, c in group_choices("model") if data.kind in accepted_kinds(c, data.kind)]
    needed = " or ".join(accepted_kinds(model, ""))
    return (
        f"model: {model.__name__} is for {needed}, and {type(data).__name__} gives {data.kind}; "
        f"choose data={'|'.join(fitting_data)} for this model, or model={'|'.join(fitting_models)} for this data"
    )


def task_class(cfg: DictConfig) -> Any:
    """Return the class of a config's task."""
    return get_class(cfg.task._target_)


def check_task(cfg: DictConfig, data: DataModule) -> None:
    """Refuse a task that does not fit the data, and a monitored metric that the task does not log."""
    task = task_class(cfg)
    unsupported = unsupported_by(task, data)
    if unsupported:
        models = [name for name, c in group_choices("model") if {*accepted_kinds(c, "")} & {*accepted_kinds(task, "")}]
        raise ConfigError(
            f"task: {task.__name__} does not go with {type(data).__name__}, which gives {', '.join(unsupported)}; "
            f"leave task= out, the data chooses it, or choose task={'|'.join(tasks_for(data))}"
            + (f"; for {task.__name__}, choose model={'|'.join(models)}" if models else "")
        )
    if cfg.task.get("test_time_augmentation", "none") != "none" and data.kind != "images":
        raise ConfigError(
            f"task.test_time_augmentation={cfg.task.test_time_augmentation}: it makes views of images, and "
            f"{type(data).__name__} gives {data.kind}; leave it at none"
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


def tasks_for(data: DataModule) -> Iterator[str]:
    """Yield the choices of conf/task that fit the data."""
    for file in sorted((CONF / "task").glob("*.yaml")):
        content: Any = OmegaConf.load(file)
        # the command line names the class of task=lightning
        if file.stem != "lightning" and not unsupported_by(get_class(content.task._target_), data):
            yield file.stem


def unsupported_by(task: Any, data: DataModule) -> list[str]:
    """Return the properties of the data that a task does not accept: their kind, or sizes."""
    if task.takes:
        return [] if data.kind in task.takes else [data.kind]
    parameters = inspect.signature(task).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [] if takes_any else sorted(set(data.task_sizes) - set(parameters))


def check_callbacks(cfg: DictConfig) -> None:
    """Refuse callbacks that monitor an unlogged metric or the wrong direction, or that would never act."""
    task = task_class(cfg)
    for name, callback in cfg.callbacks.items():
        if callback is None:
            continue
        if callback.get("update_every_n_steps", 1) < 1:
            raise ConfigError(
                f"callbacks.{name}.update_every_n_steps={callback.update_every_n_steps}: at least 1 is needed"
            )
        if str(callback.get("_target_")).endswith(".GradientAccumulationScheduler"):
            raise ConfigError(
                f"callbacks.{name}: data.batch_size is the batch of a step, and its gradients begin anew in each; "
                "trainer.accumulate_grad_batches sums the gradients of a fixed number of batches"
            )
        if task.num_views or task.trained_parts is not Task.trained_parts:
            refuse_measure(name, callback, task)
        metric = callback.get("monitor")
        if metric is None:
            continue
        metrics = [f"val/{name}" for name in task.monitorable]
        trained = [f"train/{name}" for name in (*task.monitorable, "lr", "gradient_norm", "skipped_steps")]
        if metric in trained:
            continue
        if metric not in metrics:
            raise ConfigError(f"callbacks.{name}.monitor={metric}: {menu(str(metric), metrics, task.__name__)}")
        better = task.monitorable[metric.removeprefix("val/")]
        if callback.get("mode", "min") != better:  # min is Lightning's default
            raise ConfigError(f"callbacks.{name}.mode: of {metric} it is {better}; set callbacks.{name}.mode={better}")


def refuse_measure(name: str, callback: DictConfig, task: Any) -> None:
    """Refuse a diagnostic on a task whose loss is not defined for plain, unaugmented samples."""
    from ablab.callbacks.diagnostics.diagnostic import Diagnostic  # only needed here

    builder = get_object(callback._target_)
    if isinstance(builder, type) and issubclass(builder, Diagnostic):
        why = "compares augmented views" if task.num_views else "trains each of its networks by a loss of its own"
        raise ConfigError(
            f"callbacks.{name}: it measures on the loss of samples that are not augmented, and {task.__name__} {why}; "
            "leave it out"
        )


def check_loggers(cfg: DictConfig) -> None:
    """Check the settings of own loggers before a folder exists; Lightning's may connect when they are built."""
    for logger in cfg.logger.values():
        if logger is not None and hasattr(get_object(logger._target_), "begin"):
            build(logger, save_dir=Path(cfg.output_dir))


def check_batch_shares(cfg: DictConfig, num_batches: dict[str, int]) -> None:
    """Refuse a fraction that amounts to less than one batch."""
    for part, number in num_batches.items():
        share = cfg.trainer[f"limit_{part}_batches"]
        if isinstance(share, float) and int(share * number) == 0 < number:
            raise ConfigError(
                f"trainer.limit_{part}_batches={share}: that is less than one of {number} batches; give a larger "
                "share, or how many batches as a whole number"
            )


def batches_in_epoch(cfg: DictConfig, num_batches: int) -> int:
    """Return the training batches per epoch after `trainer.limit_train_batches`."""
    limit = cfg.trainer.limit_train_batches
    limit = 1.0 if limit is None else limit
    return min(limit, num_batches) if isinstance(limit, int) else int(limit * num_batches)


def warn_of_short_training(cfg: DictConfig, num_batches: int) -> None:
    """Warn if the training ends before a warmup does, or before a callback starts.

    Training runs cut short by `trainer.limit_train_batches`, and those of one step, are trials and get no warning.
    """
    limit = cfg.trainer.limit_train_batches
    if limit is not None and not (isinstance(limit, float) and limit == 1):  # 1 is one batch, 1.0 is all of them
        return
    in_epoch, epochs, steps = batches_in_epoch(cfg, num_batches), cfg.trainer.max_epochs, cfg.trainer.max_steps
    of_epochs = math.inf if epochs == -1 else epochs * in_epoch
    of_epochs = math.ceil(of_epochs / cfg.trainer.get("accumulate_grad_batches", 1)) if epochs != -1 else of_epochs
    total = of_epochs if steps == -1 else min(steps, of_epochs)
    if total <= 1 or math.isinf(total):
        return
    say = rank_zero_only(partial(print, file=sys.stderr))
    for group in ("scheduler", "optimizer"):
        warmup = cfg[group].get("warmup_steps")
        if warmup is not None and warmup >= total:
            say(
                f"warning: {group}.warmup_steps={warmup}: the training has {total} steps, and never reaches "
                f"optimizer.lr={cfg.optimizer.get('lr')}; choose fewer, or train longer"
            )
    epochs = math.ceil(total / in_epoch)
    for name, callback in cfg.callbacks.items():
        for key in ("start_epoch", "epoch"):
            start = None if callback is None else callback.get(key)
            if isinstance(start, int) and start >= epochs:
                say(
                    f"warning: callbacks.{name}.{key}={start}: the training has {epochs} epochs, counted from 0, so "
                    f"that it never acts; choose a smaller one, or leave it out with callbacks.{name}=null"
                )


def check_validation(cfg: DictConfig, num_batches: int) -> None:
    """Refuse a validation interval longer than an epoch."""
    every, in_epoch = cfg.trainer.val_check_interval, batches_in_epoch(cfg, num_batches)
    if isinstance(every, int) and cfg.trainer.check_val_every_n_epoch is not None and every > in_epoch > 0:
        raise ConfigError(
            f"trainer.val_check_interval={every}: an epoch has {in_epoch} batches; choose fewer, "
            "or count through epochs with trainer.check_val_every_n_epoch=null"
        )


def accepted_kinds(model_or_task: type, otherwise: str) -> tuple[str, ...]:
    """Return the kinds of data that a model or task declares in `takes`, or the fallback if it declares none."""
    return getattr(model_or_task, "takes", (otherwise,))


def group_choices(group: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each YAML of a group and the class that it builds."""
    for file in sorted((CONF / group).glob("*.yaml")):
        if file.stem != "lightning":  # its class is named on the command line
            yield file.stem, get_class(yaml_target(file))


def yaml_target(file: Path) -> str:
    """Return the `_target_` of a YAML, or of the YAML of its folder that it builds upon."""
    own: Any = OmegaConf.load(file)
    if "_target_" in own:
        return own._target_
    [parent] = [entry for entry in own.defaults if isinstance(entry, str) and "@" not in entry and entry != "_self_"]
    return yaml_target(file.with_stem(parent))
