"""What a person sees around the training: what will be trained, with which norm and where, and what came out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ablab.data.datamodule import DataModule
from ablab.lab.run.folder import short
from ablab.norms import Norm, NormLayer, builtin_norms, norm_layers
from ablab.norms.plain import Identity

# Hints of libraries that ask for nothing this project wants changed; every other warning is shown.
NAGS = (
    r"The '\w+_dataloader' does not have many workers",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"It is recommended to use `self.log\('.*', \.\.\., sync_dist=True\)`",  # torchmetrics has reduced it already
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Total length of `list` across ranks is zero",  # no validation, asked for with data.val_fraction=0
    r"The `srun` command is available on your system but is not used",  # on a cluster's login node, on purpose
)


def quiet() -> None:
    """Keep libraries' tips and nags from the screen; warnings that matter stay."""
    for nag in NAGS:
        warnings.filterwarnings("ignore", message=nag)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def describe(data: Any, model: nn.Module, norm: Norm | None, batch_sizes: Mapping[str, int]) -> str:
    """The data's parts, the model's parts with their parameters, and the norm with its places.

    Args:
        data: the data module; a module from outside may bring its own loaders, and is given itself.
        model: the network.
        norm: of the network; None where it brings its own.
        batch_sizes: see `ablab.lab.train.seen_by`; of data that this project knows.
    """
    model_line = (
        f"model: {type(model).__name__}, {count(model):,} parameters ("
        + ", ".join(f"{name} {count(child):,}" for name, child in model.named_children() if count(child))
        + ")"
    )
    about = about_data(data, batch_sizes) if batch_sizes else [f"data: {type(data).__name__}"]
    named = [] if norm is None else [f"norm: {norm!r}"]
    return "\n".join([*about, model_line, *named, *norms_found(model, norm)])


def about_data(data: DataModule, batch_sizes: Mapping[str, int]) -> list[str]:
    """The sizes of the splits and of the batches."""
    sizes = {name: len(part) for name, part in vars(data.splits).items() if isinstance(part, Sized)}
    num_batches = len(data.train_dataloader())
    return [
        f"data: {type(data).__name__}, "
        + "; ".join([", ".join(f"{size:,} {name}" for name, size in sizes.items()), *data.caveats()]),
        f"batch: {batch_sizes['optimizer']} for the optimizer, {batch_sizes['forward']} forward, "
        f"{batch_sizes['norm']} for the norm; {num_batches} batches an epoch"
        + (f", {rest} samples left out of each" if (rest := sizes["train"] - num_batches * data.batch_size) else ""),
    ]


def norms_found(model: nn.Module, norm: Norm | None) -> list[str]:
    """Where a model has norms, by kind: those of this project, reparametrized weights, and the model's own."""
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
    return [f"  {what}, at {len(names)} places: {', '.join(first_and_last(names))}" for what, names in found.items()]


def results(
    chosen: Mapping[str, float], tested: Mapping[str, float], folder: Path, *, is_monitored: bool = True
) -> str:
    """A short table of what came out, and where it is.

    Args:
        chosen: the validation metric of the best checkpoint; empty if there is none.
        tested: the metrics of the test.
        folder: the run's.
        is_monitored: a metric was to choose the best checkpoint.
    """
    without = "no validation took place" if is_monitored else "monitor.metric=null, so none was chosen as the best"
    picked = [("best checkpoint by", f"{name} {value:.4f}") for name, value in chosen.items()]
    rows = [
        *(picked or [("last weights", without)]),
        *((name, f"{value:.4f}") for name, value in tested.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {text}" for name, text in rows), f"{'run':<{width}}  {short(folder)}"])


def count(module: nn.Module) -> int:
    """The module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def first_and_last(names: list[str]) -> list[str]:
    return names if len(names) <= 5 else [*names[:3], "…", names[-1]]
