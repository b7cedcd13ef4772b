"""Support for external LightningModules and data modules: `task=lightning` and `data=lightning`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, WeightAveraging
from omegaconf import DictConfig, OmegaConf

from ablab.callbacks.nonfinite import NonFinite
from ablab.digest import digest
from ablab.errors import ConfigError
from ablab.lab.config.build import add_config_path, build
from ablab.lab.exact.checkpoints import Checkpoints, WithoutCheckpoints
from ablab.lab.exact.exact import Exact
from ablab.lab.launch.strategies import Sharded
from ablab.lab.trainer import Trainer
from ablab.optim.optimizer import make_optimizer
from ablab.optim.schedules import lr_scheduler_config
from ablab.tasks.task import TaskHooks, is_overridden

DEFAULT_DATA = "ablab.data.digits.Digits"  # the default of conf/train.yaml


def build_guest(cfg: DictConfig, chosen: set[str]) -> tuple[L.LightningModule, L.LightningDataModule | None]:
    """Build a LightningModule and its data module.

    Parts that the module brings itself are removed from the config, so that the record of a run lists no unused
    setting: the default data, if the module has loaders, and optimizer and scheduler, if it configures its own.

    Args:
        cfg: the composed config; modified in place.
        chosen: the groups and keys set on the command line.

    Raises:
        ConfigError: the module cannot be built, or lacks data.
    """
    module: Any = build(cfg.task)
    if not isinstance(module, L.LightningModule):
        raise ConfigError(
            f"task._target_={cfg.task._target_}: it makes a {type(module).__name__}, and a LightningModule is needed"
        )
    brings_data = is_overridden(module, "train_dataloader", L.LightningModule)
    target = None if cfg.data is None else cfg.data.get("_target_")
    if target is None or (brings_data and target == DEFAULT_DATA and "data" not in chosen):
        cfg.data = None
    if cfg.data is None and not brings_data:
        raise ConfigError(
            f"data: {type(module).__name__} has no train_dataloader of its own; choose data=lightning "
            "data._target_=package.module.DataModule, or one of this project's data sets"
        )
    data = None if cfg.data is None else build(cfg.data)
    if data is not None and not isinstance(data, L.LightningDataModule):
        raise ConfigError(
            f"data._target_={cfg.data._target_}: it makes a {type(data).__name__}, and a LightningDataModule is needed"
        )
    if is_overridden(module, "configure_optimizers", L.LightningModule):
        for group in ("optimizer", "scheduler"):
            if group in chosen:
                raise ConfigError(
                    f"{group}: {type(module).__name__} configures its own in configure_optimizers; leave {group}= out, "
                    "or remove that method"
                )
            cfg[group] = None
    else:
        add_configure_optimizers(module, build(cfg.optimizer), build(cfg.scheduler))
    return module, data


def add_configure_optimizers(
    module: L.LightningModule, optimizer: Callable[..., Any], scheduler: Callable[..., Any]
) -> None:
    """Add `configure_optimizers` with the optimizer and schedule of the config to a module that has none."""

    def configure_optimizers() -> Any:
        with add_config_path("optimizer"):
            built = make_optimizer(optimizer, module)
        steps = module.trainer.estimated_stepping_batches
        return {"optimizer": built, "lr_scheduler": lr_scheduler_config(scheduler, built, int(steps))}

    vars(module)["configure_optimizers"] = configure_optimizers


def check_callbacks(cfg: DictConfig, callbacks: list[L.Callback]) -> None:
    """Refuse callbacks that only work with this project's tasks.

    Raises:
        ConfigError: names the callback.
    """
    for callback in callbacks:
        if type(callback).__module__.startswith("ablab.") and not isinstance(
            callback, Checkpoints | WithoutCheckpoints | NonFinite | ProgressBar | WeightAveraging | TaskHooks
        ):
            name = next(
                (key for key, node in cfg.callbacks.items() if node and type(callback).__name__ in str(node._target_)),
                type(callback).__name__,
            )
            raise ConfigError(
                f"callbacks.{name}: {type(callback).__name__} looks into this project's tasks, and does nothing for "
                "another LightningModule; leave it out"
            )


def attach_exact(trainer: L.Trainer, seed: int) -> None:
    """Attach exact resuming to a trainer, and detach the hooks that serve this project's tasks."""
    others = [callback for callback in trainer.callbacks if not isinstance(callback, TaskHooks)]  # type: ignore[attr-defined]
    first = [callback for callback in others if isinstance(callback, Checkpoints | WithoutCheckpoints)]
    rest = [callback for callback in others if callback not in first]
    trainer.callbacks = [*first, Exact(seed=seed), *rest]  # type: ignore[attr-defined]


def data_record(cfg: DictConfig) -> dict[str, Any]:
    """Return the record of the data before they are read: a hash of their settings.

    A resumed run verifies the data themselves on the last batch before the resume, see `ablab.lab.exact.loaders`.
    """
    settings = OmegaConf.to_container(cfg.data, resolve=True) if cfg.data is not None else None
    return {"fingerprint": digest(settings), "fingerprint_of": "settings"}


def check_trainer(cfg: DictConfig, trainer: Trainer) -> None:
    """Refuse trainer settings that only work with this project's models.

    Raises:
        ConfigError: names the setting.
    """
    if isinstance(trainer.strategy, Sharded):
        raise ConfigError(
            "trainer=fsdp: it shards this project's models; choose trainer=ddp for another LightningModule"
        )
    if trainer.compile is not None:
        raise ConfigError(
            f"trainer.compile={trainer.compile}: it compiles this project's models; call self.net.compile() in the "
            "LightningModule instead"
        )
    check_callbacks(cfg, trainer.callbacks)  # type: ignore[attr-defined]
