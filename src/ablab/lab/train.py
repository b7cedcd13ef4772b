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
from ablab.lab.config.build import add_config_path, build
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
from ablab.lab.exact.checkpoints import Checkpoints, WithoutCheckpoints, network
from ablab.lab.exact.exact import seed_before_fit
from ablab.lab.launch.processes import check_possible, first_failure, lost_worker, process_group
from ablab.lab.launch.strategies import cluster_environment, full_weights, load_weights
from ablab.lab.run.checkpoint_files import BEST, VerifiedFiles, read_weights
from ablab.lab.run.folder import relpath, resume_command
from ablab.lab.run.identity import plain
from ablab.lab.run.restorable import check_checkpoint, check_guest_checkpoint
from ablab.lab.run.resume import key_of, own_overrides
from ablab.lab.run.run import Run
from ablab.lab.trainer import Trainer
from ablab.models.interface import InitFromData
from ablab.norms import Norm
from ablab.rank import launcher, rank, remove_stale_rank_variables
from ablab.screen import silence_stdout, wrap_to_terminal
from ablab.tasks.task import Task, is_overridden

print_once = rank_zero_only(print)

NUM_INIT_SAMPLES = 5000  # training samples for data-dependent initialization


def train(cfg: DictConfig, *, on_open: Callable[[Path], None] | None = None) -> Run:
    """Train a model, test its best weights, and record everything in the run's folder.

    Args:
        cfg: the composed config, see conf/train.yaml.
        on_open: called with the run's folder as soon as it exists.

    Returns:
        The run: its folder, and its metrics: the validation metric that selected the weights and their test metrics;
        without validation, the test metrics of the last weights.

    Raises:
        ConfigError: the config is invalid; nothing has been written.
        RunError: training failed for a reason that a person can fix; the run's folder is valid.
        Stopped: the run was asked to stop, and can be resumed.
    """
    number = num_workers_to_start(cfg)
    if number > 0:
        from ablab.lab.launch.torchrun import launch  # only now: it takes a second to load

        ended = launch(train, cfg, number, cfg.trainer.get("max_restarts", 0))
        return Run.finished(Path(ended.folder), ended.metrics, ended.weights)
    with silence_stdout(cfg.quiet):
        parts = assemble(cfg)
    data, trainer, task = parts.data, parts.trainer, parts.task
    facts: dict[str, Any] = {"data": guests.data_record(cfg)}
    check: Callable[..., None] = partial(check_guest_checkpoint, module=task, trainer=trainer)
    if isinstance(data, DataModule) and isinstance(task, Task):
        assert parts.norm is not None
        facts = {"data": data.record(), "batch_sizes": effective_batch_sizes(data, parts.norm, trainer)}
        check = partial(check_checkpoint, task=task, trainer=trainer, data=data)

    with (
        silence_stdout(cfg.quiet) as stdout,
        process_group(trainer, cfg),
        Run.open(cfg, rank=trainer.global_rank, world_size=trainer.world_size, check_state=check, **facts) as run,
        first_failure(),
        lost_worker(),
    ):
        if on_open is not None:
            on_open(run.folder)
        print_once(f"run: {relpath(run.folder)}")
        if cfg.resume is not None:
            print_once(
                f"resumed from {run.checkpoint.name if run.checkpoint else 'its beginning: there is no checkpoint yet'}"
            )
        trainer.loggers = run.start_loggers(cfg.logger)
        described = terminal.describe_run(data or task, parts.model, parts.norm, facts.get("batch_sizes", {}))
        print_once(wrap_to_terminal(described, sys.stdout))
        try:
            began = time.perf_counter()
            if is_guest(cfg):
                seed_before_fit(cfg.seed)  # its data module may draw random numbers in setup
            trainer.fit(task, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
            run.seconds = time.perf_counter() - began
            if trainer.profile is not None:
                run.record["profile"] = trainer.profile.found
            run.weights = {"last": weights_digest(full_weights(parts.model))}
            chosen: dict[str, float] = {}
            if parts.checkpoints is not None and parts.checkpoints.best_score is not None:
                chosen = {cfg.monitor.metric: parts.checkpoints.best_score}
                best = read_weights(run.folder / "checkpoints" / BEST, like=parts.model.state_dict())
                load_weights(parts.model, best)
                run.weights["best"] = weights_digest(full_weights(parts.model))
            tested = test(parts, chosen)
        except Stopped as stopped:
            command = resume_command(run.folder) + (" trust=true" if needs_trust(cfg, trainer) else "")
            print_once(f"stopped by {stopped}; go on with: {command}", file=stdout)
            raise
        run.metrics = {**chosen, **tested}
        is_monitored = cfg.monitor.metric is not None
        print_once(terminal.format_results(chosen, tested, run.folder, is_monitored=is_monitored), file=stdout)
    return run


def num_workers_to_start(cfg: DictConfig) -> int:
    """Return the number of DDP workers that a run needs and nobody has started; 0 if it is this process alone.

    Raises:
        ConfigError: the processes cannot be started from here.
    """
    if launcher() is not None or (cfg.trainer.devices == 1 and cfg.trainer.strategy == "auto"):
        return 0
    prepare_process(cfg)
    trainer = build_trainer(cfg, prefix="")
    if not isinstance(trainer.strategy, ParallelStrategy):
        return 0
    check_possible(cfg, trainer)
    return int(trainer.strategy.num_processes)  # type: ignore[attr-defined]


def test(parts: Parts, chosen: Collection[str]) -> dict[str, float]:
    """Test the model; for a module without a test, return the last logged metrics.

    Args:
        parts: the parts of the run.
        chosen: metrics of the best checkpoint, kept from being replaced by their last values.
    """
    owner: Any = parts.task if parts.data is None else parts.data
    base = L.LightningModule if parts.data is None else L.LightningDataModule
    if is_overridden(parts.task, "test_step", L.LightningModule) and is_overridden(owner, "test_dataloader", base):
        of_each_loader = parts.trainer.test(parts.task, datamodule=parts.data, verbose=False)
        return {name: value for tested in of_each_loader for name, value in tested.items()}
    last = parts.trainer.callback_metrics
    return {name: float(value) for name, value in last.items() if name not in chosen}


def needs_trust(cfg: DictConfig, trainer: Trainer) -> bool:
    """Return whether resuming the run requires `trust=true`, see `ablab.lab.config.trust` and `VerifiedFiles`."""
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
    """The objects that a config describes, built and checked; an external module has no norm of this project."""

    data: DataModule | L.LightningDataModule | None
    norm: Norm | None
    trainer: Trainer
    task: L.LightningModule
    checkpoints: Checkpoints | None

    @property
    def model(self) -> nn.Module:
        """The network whose weights a run keeps; an external module as a whole."""
        return network(self.task)


def assemble(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> Parts:
    """Build all parts of a run from a config, and check them before they are used.

    Args:
        cfg: the composed config.
        scored: the split that the test uses.

    Raises:
        ConfigError: the config is invalid.
    """
    if is_guest(cfg):
        return assemble_guest(cfg)
    data, norm, trainer = build_and_check(cfg, scored=scored)
    model = build(cfg.model, norm=norm, **data.model_sizes)
    if isinstance(model, InitFromData):
        model.init_from_data(data.first_samples(NUM_INIT_SAMPLES).inputs)
    task = build_task(cfg, data, norm, model)
    trainer.precision_plugin.convert_module(task)  # Lightning does so only after loading a checkpoint, in float32
    trainer.prepare(task.model)
    return Parts(data, norm, trainer, task, find_checkpoints(trainer))


def assemble_guest(cfg: DictConfig) -> Parts:
    """Build an external LightningModule and its data module, and attach exact resuming to the trainer.

    Raises:
        ConfigError: the config is invalid.
    """
    prepare_process(cfg)
    cfg = with_trial_options(cfg)
    chosen = {key_of(word) for word in own_overrides() or ()}
    with add_config_path("task"):
        module, data = guests.build_guest(cfg, chosen)
    if isinstance(data, DataModule):
        with add_config_path("data"):
            setup_data(data, plain(cfg.data))
    trainer = build_trainer(cfg, prefix="", shards=not isinstance(data, DataModule))
    guests.check_trainer(cfg, trainer)
    check_loggers(cfg)
    trainer.precision_plugin.convert_module(module)
    guests.attach_exact(trainer, cfg.seed)
    return Parts(data, None, trainer, module, find_checkpoints(trainer))


def find_checkpoints(trainer: Trainer) -> Checkpoints | None:
    """Return the callback that saves checkpoints, or None."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)


def build_and_check(
    cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test"
) -> tuple[DataModule, Norm, Trainer]:
    """Build data, norm and trainer of a config, and check everything on the meta device.

    Raises:
        ConfigError: the config is invalid.
    """
    prepare_process(cfg)
    overfits = bool(cfg.trainer.get("overfit_batches"))
    cfg = with_trial_options(cfg)
    data = build_data(cfg, scored=scored)
    data.repeats_first_epoch = overfits
    data.num_views = task_class(cfg).num_views
    norm = build(cfg.norm)
    trainer = build_trainer(cfg, prefix="model.")
    check_sharding(cfg, trainer)
    dry_run(cfg, data, norm, trainer.world_size)
    return data, norm, trainer


def check_buildable(cfg: DictConfig) -> str | None:
    """Check that a run can be built, and return the fingerprint of its data.

    Returns:
        None for external data, which are only read when a run trains.

    Raises:
        ConfigError: the config is invalid.
    """
    if is_guest(cfg):
        assemble_guest(cfg.copy())
        return None
    data, _, _ = build_and_check(cfg)
    return data.fingerprint


def prepare_process(cfg: DictConfig) -> None:
    """Seed this process, and check settings that need no built objects.

    Raises:
        ConfigError: the config is invalid.
    """
    terminal.silence_libraries()
    remove_stale_rank_variables()  # a notebook may have set variables since
    check_start()
    rank_zero_only.rank = rank()  # type: ignore[attr-defined]  # at import, Lightning trusts any RANK variable
    with add_config_path("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)
    check_targets(cfg)
    check_trainer(cfg)


def with_trial_options(cfg: DictConfig) -> DictConfig:
    """Return a config with the limits that `trainer.fast_dev_run` and `trainer.overfit_batches` imply.

    A trial has a folder, checkpoints and logs like every run; Lightning's own `fast_dev_run` has none.
    """
    num_batches, overfit = int(cfg.trainer.get("fast_dev_run") or 0), cfg.trainer.get("overfit_batches") or 0
    if not num_batches and not overfit:
        return cfg
    cfg = cfg.copy()
    if overfit:
        cfg.trainer.update(limit_train_batches=overfit, limit_val_batches=overfit)
        if not is_guest(cfg):
            cfg.trainer.overfit_batches = 0  # Lightning would replace the loader; the data repeat their first epoch
        print_once(
            f"trial: trainer.overfit_batches={overfit}, so every epoch has the same training batches", file=sys.stderr
        )
    if num_batches:
        limits = {f"limit_{stage}_batches": num_batches for stage in ("train", "val", "test")}
        cfg.trainer.update(max_epochs=1, max_steps=num_batches, fast_dev_run=False, log_every_n_steps=1, **limits)
        cfg.trainer.update(val_check_interval=1.0, check_val_every_n_epoch=1, num_sanity_val_steps=0)
        what = f"{num_batches} batch{'es' if num_batches > 1 else ''} of training, validation and test"
        print_once(f"trial: trainer.fast_dev_run={num_batches}, so only {what}", file=sys.stderr)
    return cfg


def build_trainer(cfg: DictConfig, *, prefix: str, shards: bool = False) -> Trainer:
    """Build the trainer and its callbacks.

    Args:
        cfg: the composed config.
        prefix: of the model's weights in the state dict of the LightningModule.
        shards: add distributed samplers, since the loaders do not shard by themselves.

    Raises:
        ConfigError: the config is invalid.
    """
    callbacks = [build(callback) for callback in cfg.callbacks.values() if callback is not None]
    # checkpoints are saved before the hooks of other callbacks run
    callbacks.sort(key=lambda callback: not isinstance(callback, Checkpoints))
    if not any(isinstance(callback, Checkpoints) for callback in callbacks):
        callbacks.insert(0, WithoutCheckpoints())
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


def build_data(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> DataModule:
    """Build the data module of a config, and read its data.

    Raises:
        ConfigError: the data cannot be read.
    """
    data: DataModule = build(cfg.data)
    data.scored = scored
    with add_config_path("data"):
        setup_data(data, plain(cfg.data))
    return data


def effective_batch_sizes(data: DataModule, norm: Norm, trainer: L.Trainer) -> dict[str, int]:
    """Return the samples per optimizer step, per forward pass of one process, and per statistic of the norm.

    The three differ: with micro-batches, batch norm sees one micro-batch, and more processes make the batch of each
    smaller.
    """
    micro = data.forward_size(trainer.world_size)
    return {
        "optimizer": data.batch_size * trainer.accumulate_grad_batches,
        "forward": micro,
        "norm": norm.normalization_batch_size(micro, trainer.world_size),
    }
