"""One run, from its config to its results: `train` reads top to bottom."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import nn

from ablab.data.datamodule import DataModule
from ablab.data.reading import setup_data
from ablab.digest import weights_digest
from ablab.errors import ConfigError, Stopped
from ablab.lab import guests, terminal
from ablab.lab.config.build import blame, build
from ablab.lab.config.schema import is_guest
from ablab.lab.config.trust import check_targets
from ablab.lab.dry_run import (
    build_task,
    check_launcher,
    check_loggers,
    check_sharding,
    check_start,
    check_trainer,
    dry_run,
    task_class,
)
from ablab.lab.exact.checkpoints import Checkpoints, Unsaved, network
from ablab.lab.exact.exact import seed_before_fit
from ablab.lab.launch.processes import check_possible, first_failure, lost_worker, process_group
from ablab.lab.launch.strategies import cluster_environment, load_weights, whole_weights
from ablab.lab.run.checkpoint_files import BEST, VerifiedFiles, read_weights
from ablab.lab.run.folder import go_on_command, short
from ablab.lab.run.identity import plain
from ablab.lab.run.restorable import check_guest_state, check_state
from ablab.lab.run.resume import key_of, own_overrides
from ablab.lab.run.run import Run
from ablab.lab.trainer import Trainer
from ablab.models.interface import InitFromData
from ablab.norms import Norm
from ablab.rank import launcher, rank, remove_stale_rank_variables
from ablab.screen import silence_stdout, wrap_to_terminal
from ablab.tasks.task import Task, is_overridden

say = rank_zero_only(print)

SHOWN = 5000  # training samples that a model may take its first weights from


def train(cfg: DictConfig) -> Run:
    """Train a model, test its best weights, and record everything in the run's folder.

    Args:
        cfg: the composed config, see conf/train.yaml.

    Returns:
        The run: its folder, and its metrics, which are the validation metric that chose the weights and their test
        metrics; without any validation, the test metrics of the last weights.

    Raises:
        ConfigError: something in the config is wrong; nothing has been written.
        RunError: training went wrong in a way that a person can fix; the run's folder is in order.
        Stopped: the run was asked to stop, and can be resumed.
    """
    number = num_workers_to_start(cfg)
    if number > 0:
        from ablab.lab.launch.torchrun import launch  # only now: it takes a second to load

        with silence_stdout(cfg.quiet):
            ended = launch(train_here, cfg, number, cfg.trainer.get("max_restarts", 0))
        return Run.finished(Path(ended.folder), ended.metrics, ended.weights)
    return train_here(cfg)


def num_workers_to_start(cfg: DictConfig) -> int:
    """Return the number of DDP workers that a run needs and that nobody has started; 0 if it is this process alone.

    Raises:
        ConfigError: the processes cannot be started from here.
    """
    if launcher() is not None or (cfg.trainer.devices == 1 and cfg.trainer.strategy == "auto"):
        return 0
    begin(cfg)
    trainer = trainer_of(cfg, prefix="")
    if not isinstance(trainer.strategy, ParallelStrategy):
        return 0
    check_possible(cfg, trainer)
    return int(trainer.strategy.num_processes)  # type: ignore[attr-defined]


def train_here(cfg: DictConfig, *, on_open: Callable[[Path], None] | None = None) -> Run:
    """Train in this process, which may be one of several that have been started; see `train`.

    Args:
        cfg: the composed config.
        on_open: called with the run's folder as soon as it is there.
    """
    with silence_stdout(cfg.quiet):
        parts = assemble(cfg)
    data, trainer, task = parts.data, parts.trainer, parts.task
    facts: dict[str, Any] = {"data": guests.record_of(cfg)}
    check: Callable[..., None] = partial(check_guest_state, module=task, trainer=trainer)
    if isinstance(data, DataModule) and isinstance(task, Task):
        assert parts.norm is not None
        facts = {"data": data.record(), "batch_sizes": seen_by(data, parts.norm, trainer)}
        check = partial(check_state, task=task, trainer=trainer, data=data)

    with (
        silence_stdout(cfg.quiet) as stdout,
        process_group(trainer, cfg),
        Run.open(cfg, rank=trainer.global_rank, world_size=trainer.world_size, check_state=check, **facts) as run,
        first_failure(),
        lost_worker(),
    ):
        if on_open is not None:
            on_open(run.folder)
        say(f"run: {short(run.folder)}")
        if cfg.resume is not None:
            say(
                f"resumed from {run.checkpoint.name if run.checkpoint else 'its beginning: there is no checkpoint yet'}"
            )
        trainer.loggers = run.start_loggers(cfg.logger)
        described = terminal.describe(data or task, parts.model, parts.norm, facts.get("batch_sizes", {}))
        say(wrap_to_terminal(described, sys.stdout))
        try:
            began = time.perf_counter()
            if is_guest(cfg):
                seed_before_fit(cfg.seed)  # its data may be drawn while they are set up
            trainer.fit(task, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
            run.seconds = time.perf_counter() - began
            if trainer.profile is not None:
                run.record["profile"] = trainer.profile.found
            run.weights = {"last": weights_digest(whole_weights(parts.model))}
            chosen: dict[str, float] = {}
            if parts.checkpoints is not None and parts.checkpoints.best_score is not None:
                chosen = {cfg.monitor.metric: parts.checkpoints.best_score}
                best = read_weights(run.folder / "checkpoints" / BEST, like=parts.model.state_dict())
                load_weights(parts.model, best)
                run.weights["best"] = weights_digest(whole_weights(parts.model))
            tested = test(parts, chosen)
        except Stopped as stopped:
            command = go_on_command(run.folder) + (" trust=true" if needs_trust(cfg, trainer) else "")
            say(f"stopped by {stopped}; go on with: {command}", file=stdout)
            raise
        run.metrics = {**chosen, **tested}
        is_monitored = cfg.monitor.metric is not None
        say(terminal.results(chosen, tested, run.folder, is_monitored=is_monitored), file=stdout)
    return run


def test(parts: Parts, chosen: Collection[str]) -> dict[str, float]:
    """Test the model; of a module without a test, return the last logged metrics.

    Args:
        parts: of the run.
        chosen: metrics of the best checkpoint, whose last values would replace the best ones.
    """
    owner: Any = parts.task if parts.data is None else parts.data
    base = L.LightningModule if parts.data is None else L.LightningDataModule
    if is_overridden(parts.task, "test_step", L.LightningModule) and is_overridden(owner, "test_dataloader", base):
        of_each_loader = parts.trainer.test(parts.task, datamodule=parts.data, verbose=False)
        return {name: value for tested in of_each_loader for name, value in tested.items()}
    last = parts.trainer.callback_metrics
    return {name: float(value) for name, value in last.items() if name not in chosen}


def needs_trust(cfg: DictConfig, trainer: Trainer) -> bool:
    """Return whether a run is resumed with `trust=true` only, see `ablab.lab.config.trust` and `VerifiedFiles`."""
    files = trainer.strategy.checkpoint_io
    if isinstance(files, VerifiedFiles) and files.has_objects:
        return True
    foreign = cfg.copy()
    foreign.trust = False
    try:
        check_targets(foreign)
    except ConfigError:
        return True
    return False


@dataclass
class Parts:
    """What a config describes, built and checked; a module from outside has no norm of this project's."""

    data: DataModule | L.LightningDataModule | None
    norm: Norm | None
    trainer: Trainer
    task: L.LightningModule
    checkpoints: Checkpoints | None

    @property
    def model(self) -> nn.Module:
        """The network whose weights a run keeps; a module from outside as a whole."""
        return network(self.task)


def assemble(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> Parts:
    """Build everything that a config describes, and try what can be wrong before it is used.

    Args:
        cfg: the composed config.
        scored: the split that a test is of.

    Raises:
        ConfigError: something in the config is wrong.
    """
    if is_guest(cfg):
        return assemble_guest(cfg)
    data, norm, trainer = tried(cfg, scored=scored)
    model = build(cfg.model, norm=norm, **data.model_sizes)
    if isinstance(model, InitFromData):
        model.init_from_data(data.first_samples(SHOWN).inputs)
    task = build_task(cfg, data, norm, model)
    trainer.precision_plugin.convert_module(task)  # Lightning does after it has read a checkpoint, into float32
    trainer.prepare(task.model)
    return Parts(data, norm, trainer, task, checkpoints_of(trainer))


def assemble_guest(cfg: DictConfig) -> Parts:
    """Build a LightningModule and a data module from outside, and attach to the trainer what makes their run exact.

    Raises:
        ConfigError: something in the config is wrong.
    """
    begin(cfg)
    cfg = with_trial_options(cfg)
    chosen = {key_of(word) for word in own_overrides() or ()}
    with blame("task"):
        module, data = guests.build_guest(cfg, chosen)
    if isinstance(data, DataModule):
        with blame("data"):
            setup_data(data, plain(cfg.data))
    trainer = trainer_of(cfg, prefix="", shards=not isinstance(data, DataModule))
    guests.check_trainer(cfg, trainer)
    check_loggers(cfg)
    trainer.precision_plugin.convert_module(module)
    guests.attach(trainer, cfg.seed)
    return Parts(data, None, trainer, module, checkpoints_of(trainer))


def checkpoints_of(trainer: Trainer) -> Checkpoints | None:
    """Return the callback that saves checkpoints, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)


def tried(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> tuple[DataModule, Norm, Trainer]:
    """Data, norm and trainer of a config, once everything has been tried on the meta device.

    Raises:
        ConfigError: something in the config is wrong.
    """
    begin(cfg)
    overfits = bool(cfg.trainer.get("overfit_batches"))
    cfg = with_trial_options(cfg)
    data = data_of(cfg, scored=scored)
    data.repeats_first_epoch = overfits
    data.num_views = task_class(cfg).num_views
    norm = build(cfg.norm)
    trainer = trainer_of(cfg, prefix="model.")
    check_sharding(cfg, trainer)
    dry_run(cfg, data, norm, trainer.world_size)
    return data, norm, trainer


def try_out(cfg: DictConfig) -> str | None:
    """Try everything that can be wrong with a run, and return the fingerprint of its data.

    Returns:
        None for data from outside, which are read when a run trains.

    Raises:
        ConfigError: something in the config is wrong.
    """
    if is_guest(cfg):
        assemble_guest(cfg.copy())
        return None
    data, _, _ = tried(cfg)
    return data.fingerprint


def begin(cfg: DictConfig) -> None:
    """Seed, and check what can be checked before anything is built.

    Raises:
        ConfigError: something in the config is wrong.
    """
    terminal.quiet()
    remove_stale_rank_variables()  # a notebook may have set something since
    check_start()
    rank_zero_only.rank = rank()  # type: ignore[attr-defined]  # Lightning has taken any RANK when it was imported
    with blame("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    check_targets(cfg)
    check_trainer(cfg)


def with_trial_options(cfg: DictConfig) -> DictConfig:
    """Return a config with the limits that `trainer.fast_dev_run` and `trainer.overfit_batches` stand for.

    A trial has a folder, checkpoints and logs as every run; Lightning's own `fast_dev_run` leaves these out.
    """
    num_batches, overfit = int(cfg.trainer.get("fast_dev_run") or 0), cfg.trainer.get("overfit_batches") or 0
    if not num_batches and not overfit:
        return cfg
    cfg = cfg.copy()
    if overfit:
        cfg.trainer.update(limit_train_batches=overfit, limit_val_batches=overfit)
        if not is_guest(cfg):
            cfg.trainer.overfit_batches = 0  # Lightning would replace the loader; the data repeat their first epoch
        say(f"trial: trainer.overfit_batches={overfit}, so every epoch has the same training batches", file=sys.stderr)
    if num_batches:
        limits = {f"limit_{stage}_batches": num_batches for stage in ("train", "val", "test")}
        cfg.trainer.update(max_epochs=1, max_steps=num_batches, fast_dev_run=False, log_every_n_steps=1, **limits)
        cfg.trainer.update(val_check_interval=1.0, check_val_every_n_epoch=1, num_sanity_val_steps=0)
        what = f"{num_batches} batch{'es' if num_batches > 1 else ''} of training, validation and test"
        say(f"trial: trainer.fast_dev_run={num_batches}, so only {what}", file=sys.stderr)
    return cfg


def trainer_of(cfg: DictConfig, *, prefix: str, shards: bool = False) -> Trainer:
    """Build the trainer with its callbacks.

    Args:
        cfg: the composed config.
        prefix: of the model's weights among those of the LightningModule.
        shards: the loaders do not know of other processes, each of which is to take its share.

    Raises:
        ConfigError: something in the config is wrong.
    """
    callbacks = [build(callback) for callback in cfg.callbacks.values() if callback is not None]
    callbacks.sort(key=lambda callback: not isinstance(callback, Checkpoints))  # the state before others' hooks
    if not any(isinstance(callback, Checkpoints) for callback in callbacks):
        callbacks.insert(0, Unsaved())
    files = VerifiedFiles(prefix, keeps_objects=is_guest(cfg), trusted=cfg.trust is True)
    trainer: Trainer = build(
        cfg.trainer,
        callbacks=callbacks,
        logger=False,
        use_distributed_sampler=shards,  # see `ablab.lab.exact.loaders`; this project's loaders shard by themselves
        plugins=[files, cluster_environment()],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    check_launcher(trainer)
    return trainer


def data_of(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> DataModule:
    """The data of a config, read.

    Raises:
        ConfigError: there are no such data.
    """
    data: DataModule = build(cfg.data)
    data.scored = scored
    with blame("data"):
        setup_data(data, plain(cfg.data))
    return data


def seen_by(data: DataModule, norm: Norm, trainer: L.Trainer) -> dict[str, int]:
    """How many samples a step of the optimizer, a forward pass of one process and one statistic of the norm see.

    They are three numbers: a batch that is taken in parts is no larger for batch norm than its parts, and more
    processes make its batch smaller.
    """
    micro = data.forward_size(trainer.world_size)
    return {
        "optimizer": data.batch_size * trainer.accumulate_grad_batches,
        "forward": micro,
        "norm": norm.normalization_batch_size(micro, trainer.world_size),
    }
