"""One run, from its config to its results: `train` reads top to bottom."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from ablab import terminal
from ablab.config.build import blame, build
from ablab.data.datamodule import DataModule
from ablab.dry_run import check_trainer, dry_run
from ablab.norms import Norm
from ablab.runs.run import Run, short

say = rank_zero_only(print)


def train(cfg: DictConfig) -> dict[str, float]:
    """Train a model, test its best checkpoint, and record everything in the run's folder.

    Args:
        cfg: the composed config, see conf/train.yaml.

    Returns:
        The validation metric that chose the checkpoint, and the checkpoint's test metrics; without any validation,
        those of the last weights.

    Raises:
        ConfigError: something in the config is wrong; nothing has been written.
    """
    terminal.quiet()
    with blame("seed"):
        L.seed_everything(cfg.seed, workers=True, verbose=False)

    check_trainer(cfg)
    data = build(cfg.data)
    with blame("data"):
        data.setup("fit")
    norm = build(cfg.norm)
    callbacks = [build(callback) for callback in cfg.callbacks.values() if callback is not None]
    # the data's own order knows the processes, see ablab.data.datamodule.BatchOrder
    trainer = build(cfg.trainer, callbacks=callbacks, logger=False, use_distributed_sampler=False)
    dry_run(cfg, data, norm, trainer.world_size)

    model = build(cfg.model, norm=norm, **data.model_sizes)
    optimizer, scheduler = build(cfg.optimizer), build(cfg.scheduler)
    task = build(
        cfg.task,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        micro_batch_size=data.micro_batch_size,
        **data.task_sizes,
    )

    batch_sizes = seen_by(data, norm, trainer)
    with Run.create(cfg, batch_sizes=batch_sizes, data=data.record()) as run:
        say(f"run: {short(run.folder)}")
        trainer.loggers = run.start(
            build(node, save_dir=run.folder) for node in cfg.logger.values() if node is not None
        )
        say(terminal.describe(data, model, norm, batch_sizes))

        trainer.fit(task, datamodule=data)
        best = trainer.checkpoint_callback.best_model_score  # None if the run ended before its first validation
        chosen = {} if best is None else {cfg.monitor.metric: float(best)}
        weights = None if best is None else "best"
        [tested] = trainer.test(task, datamodule=data, ckpt_path=weights, weights_only=True, verbose=False)
        run.metrics = {**chosen, **tested}
        say(terminal.results(chosen, tested, run.folder))
    return run.metrics


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
