"""What Hydra needs to find the project's sweeper and launcher: it looks for plugins in packages of this name."""

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
    """Runs an ablation, or the grid that the words of a command make; see `ablab.lab.ablation.sweep`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context = hydra_context
        self.config = config
        try:
            self.launcher = Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=run_one, config=config
            )
        except RuntimeError as error:  # Hydra knows no class of that name
            package = config.hydra.launcher._target_.split(".")[1].replace("_", "-")
            raise HydraException(f"hydra/launcher: {error}; pip install {package}") from error

    def sweep(self, arguments: list[str]) -> Any:
        assert self.hydra_context is not None
        assert self.config is not None
        assert self.launcher is not None
        with loading(announce=not self.config.quiet):
            from ablab.lab.ablation.sweep import sweep  # only now: it loads torch and pandas

        return sweep(arguments, self.config, self.hydra_context.config_loader, self.launcher)


class AblabLauncher(Launcher):
    """Where the runs of `AblationSweeper` take place; it does them itself."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.task_function = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise NotImplementedError("it is for ablab's own sweeper; with another one, choose hydra/launcher=basic")


class LocalLauncher(AblabLauncher):
    """Runs on this machine, one after another in this process, or several at once; see `ablab.lab.launch.local`.

    Args:
        num_processes: how many runs go on at once, each in a process of its own, on one GPU of those that there are, in
            turn; "gpus" is one for each GPU.
    """

    is_local = True

    def __init__(self, num_processes: int | str = 1) -> None:
        self.num_processes = num_processes

    def launch_runs(self, runs: list[Any], progress: Any) -> None:
        from ablab.lab.launch import local  # only now: it loads torch

        local.launch(runs, self.num_processes, progress)


class SlurmLauncher(AblabLauncher):
    """Runs as one array of jobs of Slurm; see `ablab.lab.launch.slurm`.

    Args:
        site: how this cluster wants its jobs, the keys of conf/hydra/launcher/slurm.yaml.
    """

    is_local = False

    def __init__(self, **site: Any) -> None:
        self.site: Any = OmegaConf.to_container(OmegaConf.create(site))

    def launch_runs(self, runs: list[Any], progress: Any) -> None:
        from ablab.lab.launch import slurm

        slurm.launch(runs, slurm.Site(**self.site), progress)


def run_one(cfg: DictConfig) -> str:
    """What Hydra's other launchers do for each run; one that fails says so in its log.txt and disturbs no other."""
    from ablab.lab.launch.local import run_logged

    return run_logged(cfg)


class OptunaSweeper(Sweeper):
    """Searches instead of running a grid; see `ablab.lab.ablation.search`.

    Args:
        study: the name of the search, and of its folder in output_dir.
        num_trials: how many there are to be, those of earlier launches included.
        seed: of what is tried.
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
