"""Weights & Biases: online where someone is logged in, offline where not, and never a question."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ablab.runs.run import short


class WandB(WandbLogger):
    """A W&B run for one run of ours, closed with the exit code that the run had.

    Args:
        project, entity, group, tags, notes: as W&B has them.
        save_dir: the run's folder; W&B's files go into `wandb` there.
        mode: "auto" is online with a login (WANDB_API_KEY, or `wandb login`) and offline without; the environment
            variable WANDB_MODE overrides "auto".
    """

    def __init__(
        self,
        *,
        project: str,
        save_dir: str | Path,
        mode: Literal["auto", "online", "offline"] = "auto",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
    ) -> None:
        if os.environ.get("WANDB_MODE") in ("disabled", "dryrun"):
            raise ValueError(
                f"WANDB_MODE={os.environ['WANDB_MODE']}: online and offline are understood; logger=csv leaves W&B out"
            )
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_MODE", "online") == "online" and logged_in() else "offline"
        if mode == "online" and not logged_in():
            raise ValueError(
                "mode=online: no login was found; run `wandb login`, set WANDB_API_KEY, or take mode=offline"
            )
        self.mode = mode
        super().__init__(
            project=project,
            save_dir=str(save_dir),
            name=Path(save_dir).name,
            entity=entity,
            group=group,
            tags=tags,
            notes=notes,
            mode=mode,  # not WandbLogger's `offline`, which sets an environment variable for all runs to come
            settings=wandb.Settings(silent=True),  # `announce` says what matters
        )
        self._wandb_init.pop("anonymous")  # W&B warns of the setting, even when it is None

    @rank_zero_only
    def announce(self) -> None:
        """Start the W&B run and say where it is; offline, say how to look at it and how to upload it."""
        run = self.experiment
        if self.mode == "online":
            print(f"W&B: online, {run.url}")
            return
        folder = short(Path(run.dir).parent)
        reason = "" if logged_in() else " (no login found)"
        print(f"W&B: offline{reason}\n  look at it:   wandb leet {folder}\n  upload later: wandb sync {folder}")

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """Finish the W&B run: the next run of this process must not join it, and a crash must not look finished."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None


def logged_in() -> bool:
    """Whether W&B would find an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
