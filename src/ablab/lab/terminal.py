"""Summaries printed around a training run: the data, the model and its norms before it, the results after it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ablab.data.datamodule import DataModule
from ablab.lab.run.folder import relpath
from ablab.norms import Norm, NormLayer, builtin_norms, norm_layers
from ablab.norms.plain import Identity

# Warnings that call for no change in this project; every other warning is shown.
IGNORED_WARNINGS = (
    r"The '\w+_dataloader' does not have many workers",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"It is recommended to use `self.log\('.*', \.\.\., sync_dist=True\)`",  # torchmetrics has reduced it already
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Total length of `list` across ranks is zero",  # no validation, asked for with data.val_fraction=0
    r"The `srun` command is available on your system but is not used",  # on a cluster's login node, on purpose
)


def silence_libraries() -> None:
    """Silence tips and nags of libraries on the screen; all other warnings stay visible."""
    for nag in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=nag)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def describe_run(data: Any, model: nn.Module, norm: Norm | None, batch_sizes: Mapping[str, int]) -> str:
    """Describe the data splits, the parts of the model with their parameter counts, and where the norm is applied.

    Args:
        data: the data module, or an external module that brings its own loaders.
        model: the network.
        norm: of the network; None if the network brings its own.
        batch_sizes: see `ablab.lab.train.effective_batch_sizes`; empty for external data.
    """
    model_line = (
        f"model: {type(model).__name__}, {num_parameters(model):,} parameters ("
        + ", ".join(
            f"{name} {num_parameters(child):,}" for name, child in model.named_children() if num_parameters(child)
        )
        + ")"
    )
    about = describe_data(data, batch_sizes) if batch_sizes else [f"data: {type(data).__name__}"]
    named = [] if norm is None else [f"norm: {norm!r}"]
    return "\n".join([*about, model_line, *named, *describe_norms(model, norm)])


def describe_data(data: DataModule, batch_sizes: Mapping[str, int]) -> list[str]:
    """Describe the sizes of the splits and of the batches."""
    sizes = {name: len(part) for name, part in vars(data.splits).items() if isinstance(part, Sized)}
    num_batches = len(data.train_dataloader())
    return [
        f"data: {type(data).__name__}, "
        + "; ".join([", ".join(f"{size:,} {name}" for name, size in sizes.items()), *data.caveats()]),
        f"batch: {batch_sizes['optimizer']} for the optimizer, {batch_sizes['forward']} forward, "
        f"{batch_sizes['norm']} for the norm; {num_batches} batches an epoch"
        + (f", {rest} samples left out of each" if (rest := sizes["train"] - num_batches * data.batch_size) else ""),
    ]


def describe_norms(model: nn.Module, norm: Norm | None) -> list[str]:
    """List where a model has norms, by kind: norms of this project, reparametrized weights, and the model's own."""
    found: dict[str, list[str]] = {}
    layers = {name: layer for name, layer in norm_layers(model).items() if not isinstance(layer, Identity)}
    for name, layer in layers.items():
        statistics = ", ".join(map(str, layer.statistics)) if isinstance(layer, NormLayer) else type(layer).__name__
        found.setdefault(statistics or "each value on its own", []).append(name)
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found.setdefault("a reparametrized weight" if norm is None else norm.weight.title, []).append(name)
    for name, module in builtin_norms(model).items():
        found.setdefault(f"the model's own {type(module).__name__}", []).append(name)
    return [f"  {what}, at {len(names)} places: {', '.join(abbreviate(names))}" for what, names in found.items()]


def format_results(
    chosen: Mapping[str, float], tested: Mapping[str, float], folder: Path, *, is_monitored: bool = True
) -> str:
    """Return a short table of the metrics of a run and the path of its folder.

    Args:
        chosen: the validation metric of the best checkpoint; empty if there is none.
        tested: the test metrics.
        folder: the run's folder.
        is_monitored: a monitored metric selects the best checkpoint.
    """
    without = "no validation took place" if is_monitored else "monitor.metric=null, so none was chosen as the best"
    picked = [("best checkpoint by", f"{name} {value:.4f}") for name, value in chosen.items()]
    rows = [
        *(picked or [("last weights", without)]),
        *((name, f"{value:.4f}") for name, value in tested.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {text}" for name, text in rows), f"{'run':<{width}}  {relpath(folder)}"])


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def abbreviate(names: list[str]) -> list[str]:
    return names if len(names) <= 5 else [*names[:3], "…", names[-1]]
