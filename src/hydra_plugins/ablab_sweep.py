"""The project's sweepers and launchers, in a package of the name in which Hydra looks for plugins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ablab.lab.loading import loading


class AblationSweeper(Sweeper):
    """Runs an ablation, or a grid of overrides; see `ablab.lab.ablation.sweep`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        try:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=run_one, config=config
            )
        except RuntimeError as error:  # Hydra finds no class of that name
            package = config.hydra.launcher._target_.split(".")[1].replace("_", "-")
            raise HydraException(f"hydra/launcher: {error}; pip install {package}") from error

    def sweep(self, arguments: list[str]) -> Any:
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        with loading(announce=not self.config.quiet):
            from ablab.lab.ablation.sweep import sweep  # imported late: it loads torch and pandas

        return sweep(arguments, self.config, self.hydra_context.config_loader, self.launcher)


class OwnLauncher(Launcher):
    """Base of the launchers of `AblationSweeper`, which launches all runs itself."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.task_function = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise NotImplementedError("it is for ablab's own sweeper; with another one, choose hydra/launcher=basic")


class LocalLauncher(OwnLauncher):
    """Runs on this machine, serially in this process or several in parallel; see `ablab.lab.launch.local`.

    Args:
        num_processes: runs in parallel, each in its own process, on one of the GPUs in turn; "gpus" is one for each
            GPU.
    """

    is_local = True

    def __init__(self, num_processes: int | str = 1) -> None:
        self.num_processes = num_processes

    def launch_runs(self, runs: list[Any], progress: Any) -> None:
        from ablab.lab.launch import local  # imported late: it loads torch

        local.launch(runs, self.num_processes, progress)


class SlurmLauncher(OwnLauncher):
    """Runs as one Slurm job array; see `ablab.lab.launch.slurm`.

    Args:
        site: the job settings of this cluster, the keys of conf/hydra/launcher/slurm.yaml.
    """

    is_local = False

    def __init__(self, **site: Any) -> None:
        self.site: Any = OmegaConf.to_container(OmegaConf.create(site))

    def launch_runs(self, runs: list[Any], progress: Any) -> None:
        from ablab.lab.launch import slurm

        slurm.launch(runs, slurm.Site(**self.site), progress)


def run_one(cfg: DictConfig) -> str:
    """Execute one run for Hydra's other launchers; a failed run reports in its log.txt and does not affect others."""
    from ablab.lab.launch.local import run_logged

    return run_logged(cfg)


class OptunaSweeper(Sweeper):
    """Runs a search instead of a grid; see `ablab.lab.ablation.search`.

    Args:
        study: the name of the search, and of its folder in output_dir.
        num_trials: the total number of trials, including those of earlier launches.
        seed: of the sampler.
    """

    def __init__(self, study: str = "search", num_trials: int = 20, seed: int = 0) -> None:
        self.study = study
        self.num_trials = num_trials
        self.seed = seed

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config

    def sweep(self, arguments: list[str]) -> Any:
        assert self.hydra_context is not None
        assert self.config is not None
        try:
            with loading(announce=not self.config.quiet):
                from ablab.lab.ablation.search import search
        except ModuleNotFoundError as error:
            raise HydraException(f"hydra/sweeper=optuna: {error}; pip install 'ablab[search]'") from error

        loader = self.hydra_context.config_loader
        return search(arguments, self.config, loader, study=self.study, num_trials=self.num_trials, seed=self.seed)
