"""Train once with a checkpoint at every step, then resume from each checkpoint and compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ablab.lab.exact.fit import fit
from ablab.lab.run.checkpoint_files import list_checkpoints

Make = Callable[[], tuple[L.LightningModule, Any]]


def quiet_trainer(**settings: Any) -> L.Trainer:
    """Lightning's trainer on the CPU, which prints and writes nothing by itself."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def train(
    make: Make, folder: Path, *, every_n_steps: int | None = 1, **settings: Any
) -> tuple[dict[str, torch.Tensor], str]:
    """Train, or resume, in a folder; return the last weights and metrics.csv."""
    torch.manual_seed(0)  # as a program would, which draws its data while it builds them
    module, data = make()
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0, **settings}
    fit(
        quiet_trainer(**settings),
        module,
        data,
        folder=folder,
        seed=3,
        every_n_steps=every_n_steps,
        keep=1000,
        trust=True,
    )
    rows = folder / "metrics.csv"
    return module.state_dict(), rows.read_text() if rows.exists() else ""


def resume_everywhere(
    make: Make, folder: Path, *, at_most: int = 100, again: Make | None = None, **settings: Any
) -> int:
    """Resume a training from each of its checkpoints, or from some of them; each has to end as the first one did.

    Args:
        make: builds the module and its data.
        folder: an empty one.
        at_most: checkpoints to resume from.
        again: builds them for the resumed trainings.
        settings: of the trainer.

    Returns:
        the number of checkpoints resumed from.
    """
    weights, rows = train(make, folder / "whole", **settings)
    saved = list_checkpoints(folder / "whole" / "checkpoints")
    chosen = saved[:: -(-len(saved) // at_most)]
    for path in chosen:
        copy = folder / path.stem
        (copy / "checkpoints").mkdir(parents=True)
        shutil.copy(path, copy / "checkpoints")
        if rows:
            (copy / "metrics.csv").write_text(rows)
        found, found_rows = train(again or make, copy, every_n_steps=None, **settings)
        assert found_rows == rows, path.name
        assert all(torch.equal(found[name], weights[name]) for name in weights), path.name
        shutil.rmtree(copy)
    return len(chosen)
