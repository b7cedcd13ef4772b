"""One run, from its config to its results: `train` reads top to bottom."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from ablab import terminal
from ablab.callbacks.checkpoints import Checkpoints, Unsaved
from ablab.config.build import blame, build
from ablab.config.errors import ConfigError
from ablab.config.trust import check_targets
from ablab.data.datamodule import DataModule
from ablab.data.reading import set_up
from ablab.digest import weights_digest
from ablab.dry_run import check_launcher, check_sharding, check_start, check_trainer, dry_run
from ablab.models.interface import InitFromData
from ablab.norms import Norm
from ablab.restorable import check_state
from ablab.runs.checkpoints import BEST, VerifiedFiles, read_weights
from ablab.runs.folder import go_on_command, short
from ablab.runs.identity import plain
from ablab.runs.outcome import Stopped
from ablab.runs.place import ignore_left_over, rank
from ablab.runs.processes import first_failure, lost_worker, together
from ablab.runs.run import Run
from ablab.runs.strategies import cluster_environment, load_weights, whole_weights
from ablab.screen import fitted, hush
from ablab.tasks.task import Task
from ablab.trainer import Trainer

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
    with hush(cfg.quiet):
        parts = assemble(cfg)
    data, trainer, task = parts.data, parts.trainer, parts.task
    batch_sizes = seen_by(data, parts.norm, trainer)

    with (
        hush(cfg.quiet) as stdout,
        together(trainer, cfg) as members,
        Run.open(
            cfg,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            batch_sizes=batch_sizes,
            data=data.record(),
            check_state=partial(check_state, task=task, trainer=trainer, data=data),
        ) as run,
        first_failure(members),
        lost_worker(),
    ):
        say(f"run: {short(run.folder)}")
        if cfg.resume is not None:
            say(
                f"resumed from {run.checkpoint.name if run.checkpoint else 'its beginning: there is no checkpoint yet'}"
            )
        trainer.loggers = run.start(
            build(node, save_dir=run.folder) for node in cfg.logger.values() if node is not None
        )
        say(fitted(terminal.describe(data, task.model, parts.norm, batch_sizes), sys.stdout))
        try:
            began = time.perf_counter()
            trainer.fit(task, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
            run.seconds = time.perf_counter() - began
            if trainer.profile is not None:
                run.record["profile"] = trainer.profile.found
            run.weights = {"last": weights_digest(whole_weights(task.model))}
            chosen: dict[str, float] = {}
            if parts.checkpoints is not None and parts.checkpoints.best_score is not None:
                chosen = {cfg.monitor.metric: parts.checkpoints.best_score}
                best = read_weights(run.folder / "checkpoints" / BEST, like=task.model.state_dict())
                load_weights(task.model, best)
                run.weights["best"] = weights_digest(whole_weights(task.model))
            [tested] = trainer.test(task, datamodule=data, verbose=False)
        except Stopped as stopped:
            command = go_on_command(run.folder) + ("" if is_built_without_trust(cfg) else " trust=true")
            say(f"stopped by {stopped}; go on with: {command}", file=stdout)
            raise
        run.metrics = {**chosen, **tested}
        say(terminal.results(chosen, tested, run.folder), file=stdout)
    return run


def is_built_without_trust(cfg: DictConfig) -> bool:
    """Return whether a config would be built from a run's folder as it is, see `ablab.config.trust`."""
    foreign = cfg.copy()
    foreign.trust = False
    try:
        check_targets(foreign)
    except ConfigError:
        return False
    return True


@dataclass
class Parts:
    """What a config describes, built and checked."""

    data: DataModule
    norm: Norm
    trainer: Trainer
    task: Task
    checkpoints: Checkpoints | None


def assemble(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> Parts:
    """Build everything that a config describes, and try what can be wrong before it is used.

    Args:
        cfg: the composed config.
        scored: the split that a test is of.

    Raises:
        ConfigError: something in the config is wrong.
    """
    data, norm, trainer = tried(cfg, scored=scored)
    model = build(cfg.model, norm=norm, **data.model_sizes)
    if isinstance(model, InitFromData):
        model.init_from_data(data.first(SHOWN).inputs)
    optimizer, scheduler = build(cfg.optimizer), build(cfg.scheduler)
    task = build(
        cfg.task,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        micro_batch_size=data.micro_batch_size,
        seed=cfg.seed,
        **data.task_sizes,
    )
    with blame("task"):
        task.check_overrides()
    trainer.precision_plugin.convert_module(task)  # Lightning does after it has read a checkpoint, into float32
    trainer.prepare(task.model)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)
    return Parts(data, norm, trainer, task, checkpoints)


def tried(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> tuple[DataModule, Norm, Trainer]:
    """Data, norm and trainer of a config, once everything has been tried on the meta device.

    Raises:
        ConfigError: something in the config is wrong.
    """
    terminal.quiet()
    ignore_left_over()  # a notebook may have set something since
    check_start()
    rank_zero_only.rank = rank()  # type: ignore[attr-defined]  # Lightning has taken any RANK when it was imported
    with blame("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)

    check_targets(cfg)
    check_trainer(cfg)
    data = data_of(cfg, scored=scored)
    norm = build(cfg.norm)
    callbacks = [build(callback) for callback in cfg.callbacks.values() if callback is not None]
    callbacks.sort(key=lambda callback: not isinstance(callback, Checkpoints))  # the state before others' hooks
    if not any(isinstance(callback, Checkpoints) for callback in callbacks):
        callbacks.insert(0, Unsaved())
    trainer: Trainer = build(
        cfg.trainer,
        callbacks=callbacks,
        logger=False,
        use_distributed_sampler=False,  # the data's own order knows the processes, see ablab.data.order
        plugins=[VerifiedFiles(), cluster_environment()],
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
    )
    check_launcher(trainer)
    check_sharding(cfg, trainer)
    dry_run(cfg, data, norm, trainer.world_size)
    return data, norm, trainer


def data_of(cfg: DictConfig, *, scored: Literal["train", "val", "test"] = "test") -> DataModule:
    """The data of a config, read.

    Raises:
        ConfigError: there are no such data.
    """
    data: DataModule = build(cfg.data)
    data.scored = scored
    with blame("data"):
        set_up(data, plain(cfg.data))
    return data


def seen_by(data: DataModule, norm: Norm, trainer: L.Trainer) -> dict[str, int]:
    """How many samples a step of the optimizer, a forward pass of one process and one statistic of the norm see.

    They are three numbers: a batch that is taken in parts is no larger for batch norm than its parts, and more
    processes make its batch smaller.
    """
    micro = data.forward_size(trainer.world_size)
    return {
        "optimizer": data.batch_size,
        "forward": micro,
        "norm": norm.batch_seen(micro, trainer.world_size),
    }
