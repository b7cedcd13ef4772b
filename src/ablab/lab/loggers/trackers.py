"""Lightning's loggers for a run: built with its folder, resumed with it, and kept from ending it."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from omegaconf import DictConfig

from ablab.lab.config.build import build
from ablab.lab.run.redaction import first_line

CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
# MLflow's defaults have a run wait for minutes at each call where a server does not answer.
MLFLOW = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def build_loggers(
    nodes: Mapping[str, DictConfig | None], folder: Path, *, step: int = 0, ids: Mapping[str, str] | None = None
) -> dict[str, Logger]:
    """Build the loggers of a run.

    Args:
        nodes: their configs, by name; None leaves one out.
        folder: the run's folder, which loggers get as `save_dir`.
        step: the first step that will be logged; a resumed run logs the steps after its checkpoint again.
        ids: the MLflow run of each MLflow logger before the resume.

    Raises:
        ConfigError: a logger refuses its settings.
    """
    loggers = {}
    for name, node in nodes.items():
        if node is None:
            continue
        target: Any = get_object(node._target_)
        settings: dict[str, Any] = {}
        if "save_dir" in inspect.signature(target).parameters and "save_dir" not in node:
            settings["save_dir"] = folder
        if target is TensorBoardLogger and step:
            settings["purge_step"] = step  # TensorBoard hides what an earlier file has from this step on
        if target is MLFlowLogger:
            for variable, value in MLFLOW.items():
                os.environ.setdefault(variable, value)
            if ids and name in ids:
                settings["run_id"] = ids[name]
            elif "run_name" not in node:
                settings["run_name"] = folder.name
        logger: Logger = build(node, **settings)
        loggers[name] = logger if hasattr(logger, "begin") else shield(logger)
    return loggers


def shield(logger: Logger) -> Logger:
    """Keep the failures of a logger out of training.

    The first failure is printed and sets `has_failed` of the logger, which is then called no more.
    """
    name = type(logger).__name__

    def shielded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if has_failed(logger):
                return None
            try:
                return method(*args, **kwargs)
            except Exception as error:
                vars(logger)["has_failed"] = True
                print(
                    f"warning: {name} failed and gets no more metrics ({type(error).__name__}: {first_line(error)}); "
                    "metrics.csv in the run's folder has all of them",
                    file=sys.stderr,
                )
                return None

        return call

    for name_of_call in CALLS:
        setattr(logger, name_of_call, shielded(getattr(logger, name_of_call)))
    shielded(lambda: getattr(logger, "experiment", None))()  # Lightning asks for it before the first call
    return logger


def has_failed(logger: Logger) -> bool:
    """Return whether a logger that is shielded has failed."""
    return vars(logger).get("has_failed", False)


def tracker_ids(loggers: Mapping[str, Logger]) -> dict[str, str]:
    """Return the ids by which a resumed run finds its MLflow runs again."""
    return {name: str(logger.run_id) for name, logger in loggers.items() if isinstance(logger, MLFlowLogger)}
