"""Predict new inputs with the weights of a run: images, a table, or a text."""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ablab.callbacks.text_samples import generate
from ablab.data.batch import Batch
from ablab.data.datamodule import DataModule
from ablab.data.encoded_images import Encoded, load_image
from ablab.data.image_folder import images_below
from ablab.data.labelled import LabelledData
from ablab.data.table import Source
from ablab.data.token_stream import IGNORED, TokenStream, Windows
from ablab.data.vectors import Vectors
from ablab.disk import atomic_write
from ablab.errors import ConfigError
from ablab.lab.evaluate import assemble_with_weights, scoring_config
from ablab.lab.train import Parts, print_once
from ablab.tasks.task import Task

BATCH_SIZE = 256

Columns = Mapping[str, Sequence[Any]]


class Inputs(NamedTuple):
    """New inputs: the column that identifies them, and their batches in order."""

    label: str
    names: Sequence[Any]
    batches: Iterator[Batch]


def predict(
    folder: Path,
    source: Path,
    out: Path,
    *,
    weights: Literal["best", "last"] = "best",
    num_tokens: int = 50,
    trust: bool = False,
) -> int:
    """Write the predictions of the weights of a run to a CSV file.

    Args:
        folder: the run's folder.
        source: inputs of the kind that the run was trained on: a folder of images or one image, a .csv or .parquet
            table with the columns of the training table, or a UTF-8 text, scored and continued line by line.
        out: the CSV file to write. It must not exist.
        weights: the weights selected by validation, or those of the newest checkpoint.
        num_tokens: the length of the continuation of each line of a text.
        trust: build any class that the folder's config names, not only the expected kinds.

    Returns:
        The number of rows.

    Raises:
        ConfigError: the run lacks these weights, the source does not fit its data, or `out` exists.
    """
    if out.exists():
        raise ConfigError(f"out={out}: it exists; give another file, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}; make it, or give another file")
    if not source.exists():
        raise ConfigError(f"source={source}: there is no such file or folder")
    cfg = scoring_config(folder)
    parts = assemble_with_weights(folder, cfg, weights=weights, trust=trust)
    data, task = parts.data, parts.task
    if not isinstance(data, DataModule) or not isinstance(task, Task):
        raise ConfigError(
            f"{folder}: {type(task).__name__} brings its own way to read inputs; load the weights of "
            "checkpoints/best.safetensors into it in a program"
        )
    if any(str(node.get("_target_", "")).endswith(".Recalibration") for node in cfg.callbacks.values() if node):
        print_once(
            "callbacks: the statistics of norms are the moving averages, not recalibrated as in the test",
            file=sys.stderr,
        )
    task.eval().to(device_of(parts))
    try:
        if isinstance(data, TokenStream):
            columns = predict_text(parts, data, source, num_tokens)
        else:
            columns = predict_columns(parts, task, read_inputs(data, source))
    except (ValueError, NotImplementedError) as error:
        named = str(source) in str(error)
        raise ConfigError(str(error) if named else f"source={source}: {error}") from error
    rows = list(zip(*columns.values(), strict=True))
    with atomic_write(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return len(rows)


def device_of(parts: Parts) -> torch.device:
    return parts.trainer.strategy.root_device


def precision_context(parts: Parts) -> AbstractContextManager[Any]:
    """Return a context with the precision of the run's validation."""
    return parts.trainer.precision_plugin.predict_step_context()


@torch.inference_mode()
def predict_columns(parts: Parts, task: Task, inputs: Inputs) -> Columns:
    """Return the predictions for all inputs, with the column that identifies them first."""
    assert isinstance(parts.data, DataModule)
    found: dict[str, list[Any]] = {inputs.label: list(inputs.names)}
    for number, batch in enumerate(inputs.batches):
        batch = parts.data.on_after_batch_transfer(batch.on(device_of(parts)), 0)
        with precision_context(parts):
            logits = task.predict_step(batch, number)
        for name, values in task.predictions(logits).items():
            found.setdefault(name, []).extend(values)
    return found


def read_inputs(data: DataModule, source: Path) -> Inputs:
    """Read new inputs in the way in which the training data were read.

    Raises:
        ValueError: the source does not fit the data, or no reader exists for their kind.
    """
    if isinstance(data, Vectors):
        return read_table_rows(data, source)
    if isinstance(data, LabelledData) and data.kind == "images":
        return read_images(data, source)
    raise ValueError(
        f"the run was trained on {type(data).__name__} ({data.kind}); predictions are for images, tables and text"
    )


def read_images(data: LabelledData, source: Path) -> Inputs:
    """Read the images of a folder, resized to the training images if these are square."""
    left_out: Counter[str] = Counter()
    files = images_below(source, left_out) if source.is_dir() else [source]
    if not files:
        raise ValueError("there is no image in it that Pillow here can decode; give a folder of images, or one image")
    left_out = +left_out  # drops zero counts
    if left_out:
        print_once(
            f"left out: {', '.join(f'{count:,} {what}' for what, count in sorted(left_out.items()))}", file=sys.stderr
        )
    in_channels, height, width = data.first_samples(1).inputs.shape[1:]
    if in_channels not in (1, 3):
        raise ValueError(f"the run was trained on images of {in_channels} channels; predictions are for 1 or 3")
    encoded = Encoded(files, [0] * len(files), lambda i: str(files[i]))
    low, high = data.value_range

    def load(i: int) -> Tensor:
        image = load_image(encoded, i, height if height == width else None, in_channels)
        if image.shape[1:] != (height, width):
            raise ValueError(
                f"{files[i]}: it has {image.shape[1]}x{image.shape[2]} pixels, and the training images "
                f"{height}x{width}; bring it to their size"
            )
        return low + image.float() * ((high - low) / 255)

    def batches() -> Iterator[Batch]:
        for begin in range(0, len(files), BATCH_SIZE):
            loaded = [load(i) for i in range(begin, min(begin + BATCH_SIZE, len(files)))]
            yield Batch(torch.stack(loaded), torch.zeros(len(loaded), dtype=torch.long))

    names = [str(file.relative_to(source)) if source.is_dir() else file.name for file in files]
    return Inputs("file", names, batches())


def read_table_rows(data: Vectors, source: Path) -> Inputs:
    """Read the rows of a table, standardized by the training rows; other columns are ignored."""
    if source.is_dir():
        raise ValueError("it is a folder; a .csv or .parquet file is needed")
    features = data.standardize(torch.from_numpy(Source("source", source).numbers("features", data.feature_names)))
    rows = features.split(BATCH_SIZE)
    label = "row number" if "row" in data.target_names else "row"
    return Inputs(label, range(1, len(features) + 1), (Batch(part, torch.zeros(len(part))) for part in rows))


@torch.inference_mode()
def predict_text(parts: Parts, data: TokenStream, source: Path, num_tokens: int) -> Columns:
    """Score and continue each line of a text; empty lines are skipped.

    Raises:
        ValueError: the text is not UTF-8, or has a character that is not in the vocabulary.
    """
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read as UTF-8 text ({error}); give one text file") from error
    found: dict[str, list[Any]] = {name: [] for name in ("line", "tokens", "loss", "perplexity", "continuation")}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            tokens = data.tokens.encode(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}, which is of the training text; leave that out") from error
        total, predicted = 0.0, max(0, len(tokens) - 1)  # the first token has no prediction
        windows = Windows([tokens], data.context_length, keep_short=True)
        for some in torch.arange(len(windows)).split(BATCH_SIZE) if predicted else ():
            batch = windows[some].on(device_of(parts))
            with precision_context(parts):
                loss = parts.task.loss(parts.task(batch), batch)  # type: ignore[operator]
            total += float(loss) * int((batch.targets != IGNORED).sum()) / predicted
        written = generate(
            parts.model, tokens.long().to(device_of(parts)), num_tokens, context_length=data.context_length
        )
        found["line"].append(number)
        found["tokens"].append(len(tokens))
        found["loss"].append(total if predicted else "")
        found["perplexity"].append(math.exp(total) if predicted else "")
        found["continuation"].append(data.tokens.decode(written[len(tokens) :].cpu()))
    if not found["line"]:
        raise ValueError("there is no text in it; give one with at least one line")
    return found
