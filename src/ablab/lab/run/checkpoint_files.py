"""Checkpoint and weight files: written atomically, and verified when read.

`checkpoints/00000120-training.ckpt` is a checkpoint after 120 steps, in torch's own format; the hash of the file is its
ZIP comment. `checkpoints/best.safetensors` holds the weights of a model and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ablab.digest import weights_digest
from ablab.disk import atomic_write, make_parent_dir
from ablab.errors import ConfigError, RunError

HASH_PREFIX = b"sha256:"
COMMENT_LENGTH = len(HASH_PREFIX) + 64
# The position of a checkpoint within a step, in the order of training.
PHASES = ("validation", "training", "end")  # before validation, before the next step, after training
BEST = "best.safetensors"
PICKLED = "pickled object"  # the only key of a dict that holds an object


class BrokenFile(RunError):
    """A file that is truncated, changed, or not a checkpoint."""


# Writing and reading --------------------------------------------------------------------------------------------------


def write(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its hash."""
    make_parent_dir(path)
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(state, file)
        with temporary.open("rb+") as file:
            comment = HASH_PREFIX + hashlib.file_digest(file, "sha256").hexdigest().encode()
            file.seek(-2, os.SEEK_END)  # the ZIP archive ends with the length of its comment, still 0
            file.write(len(comment).to_bytes(2, "little") + comment)


def read(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Only tensors and plain data are read: nothing in the file can execute code.

    Raises:
        BrokenFile: the content does not match its hash, or is not a checkpoint.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < COMMENT_LENGTH + 22:
            raise BrokenFile(f"{path}: it is cut off, after {size} bytes")
        file.seek(-COMMENT_LENGTH, os.SEEK_END)
        comment = file.read()
        if not comment.startswith(HASH_PREFIX):
            raise BrokenFile(f"{path}: it is cut off, or no checkpoint of this project: its hash is missing")
        if HASH_PREFIX + content_hash(file, size - COMMENT_LENGTH) != comment:
            raise BrokenFile(f"{path}: its content is not what was written; its hash differs")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a forged file may raise anything in torch's reader
        reason = str(error).strip().splitlines()[0]
        raise BrokenFile(f"{path}: it holds more than tensors and plain data, and is not read ({reason})") from error


def content_hash(file: IO[bytes], size: int) -> bytes:
    """Return the hash of a file without the comment that was appended to it."""
    file.seek(0)
    found, left = hashlib.sha256(), size - 2
    while left:
        block = file.read(min(left, 1 << 20))
        found.update(block)
        left -= len(block)
    found.update(b"\0\0")
    return found.hexdigest().encode()


def write_weights(weights: dict[str, Tensor], path: Path, **facts: Any) -> None:
    """Write the weights of a model, with their hash and some metadata for people.

    Tensors that share memory are written once under each name.
    """
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    about = {"sha256": weights_digest(copies), **{name: json.dumps(fact) for name, fact in facts.items()}}
    make_parent_dir(path)
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(copies, about))


def read_weights(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Read and verify the weights of a model.

    Args:
        path: the path of the file.
        like: the weights of the model to load them into.

    Raises:
        BrokenFile: the weights do not match their hash, the file holds none, or they belong to another model.
    """
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            written = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, MemoryError) as error:
        raise BrokenFile(f"{path}: it is cut off, or holds no weights ({error})") from error
    if weights_digest(weights) != written:
        raise BrokenFile(f"{path}: its weights are not those that were written; their hash differs")
    if like is not None and (problem := weights_problem(weights, like)) is not None:
        raise BrokenFile(f"{path}: its weights are not of the model that the code now makes ({problem})")
    return weights


def weights_problem(found: Any, expected: Mapping[str, Any]) -> str | None:
    """Return the first difference in names or shapes between two sets of weights; None if there is none."""
    if not isinstance(found, Mapping):
        return f"{type(found).__name__} instead of tensors by their names"
    for names, problem in (
        (expected.keys() - found.keys(), "is missing"),
        (found.keys() - expected.keys(), "is unknown"),
    ):
        if names:
            return f"{min(map(str, names))} {problem}"
    for name, tensor in expected.items():
        here = found[name]
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(here, Tensor):
            return f"{name} is no tensor"
        if here.shape != tensor.shape:
            return f"{name} has shape {tuple(here.shape)}, and {tuple(tensor.shape)} is needed"
    return None


# A run's folder of checkpoints ----------------------------------------------------------------------------------------


def checkpoint_name(step: int, phase: str) -> str:
    return f"{step:08d}-{phase}.ckpt"


def step_and_phase(path: Path) -> tuple[int, int]:
    """Return the step and phase of a checkpoint, from its name; the pair sorts in the order of training."""
    step, _, phase = path.stem.partition("-")
    return int(step), PHASES.index(phase)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    names = [path for phase in PHASES for path in folder.glob(f"[0-9]*-{phase}.ckpt")]
    return sorted((path for path in names if path.stem.partition("-")[0].isdecimal()), key=step_and_phase)


def newest_valid(
    folder: Path,
    warn: Callable[[str], None] = warnings.warn,
    *,
    run: str | None = None,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that can be resumed from, and its content; None if none can be read.

    Each skipped checkpoint gets a warning.

    Args:
        folder: the folder of the checkpoints.
        warn: receives the warnings.
        run: the id of the run that they must belong to.
        check: raises a ValueError for a checkpoint that the code cannot resume from.

    Raises:
        ConfigError: some checkpoints can be read, but the code can resume from none of them.
    """
    unfit: tuple[Path, Exception] | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            state = read(path)
        except (BrokenFile, OSError, MemoryError) as error:
            reason = error if isinstance(error, BrokenFile) else f"{path}: it cannot be read ({error})"
            warn(f"{reason}; falling back to the previous checkpoint")
            continue
        if run is not None and (not isinstance(state, dict) or state.get("run") != run):
            warn(f"{path}: it is no checkpoint of this run; falling back to the previous checkpoint")
            continue
        try:
            if check is not None:
                check(path, state)
        except ValueError as error:
            unfit = unfit or (path, error)
            warn(f"{path}: it does not fit the code ({error}); falling back to the previous checkpoint")
            continue
        return path, state
    if unfit is not None:
        raise ConfigError(
            f"{unfit[0]}: no checkpoint of this run fits what the code now makes ({unfit[1]}); use the code of the "
            "run's commit, or begin a new run"
        )
    return None


class VerifiedFiles(CheckpointIO):
    """Lightning's checkpoint I/O for these files: `.safetensors` gets the weights, other names the whole checkpoint.

    Args:
        prefix: of the model's weights in the state dict of the LightningModule.
        keeps_objects: pickle objects that are neither tensors nor plain data, as external modules may have them.
        trusted: unpickle such objects, which may execute code.
    """

    def __init__(self, prefix: str = "model.", *, keeps_objects: bool = False, trusted: bool = False) -> None:
        self.prefix = prefix
        self.keeps_objects = keeps_objects
        self.trusted = trusted
        self.has_objects = False  # whether a checkpoint of this run has any

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        if path.suffix == ".safetensors":
            write_weights(
                model_weights(checkpoint, self.prefix), path, step=checkpoint["global_step"], epoch=checkpoint["epoch"]
            )
            return
        try:
            state = to_plain_data(checkpoint, "", pickles=self.keeps_objects)
        except TypeError as error:
            raise RunError(
                f"{path}: {error}; have on_save_checkpoint or state_dict give tensors and plain data"
            ) from error
        self.has_objects = self.has_objects or has_objects(state)
        write(state, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        state = read(Path(path))
        if not has_objects(state):
            return state
        self.has_objects = True
        if not self.trusted:
            raise RunError(
                f"{path}: it holds pickled objects, and reading them may run code; if you trust that folder as you "
                "trust code, add trust=true (in a program: fit(..., trust=True))"
            )
        try:
            return unpickle_objects(state)
        except Exception as error:  # the classes may raise anything, or no longer exist
            raise RunError(
                f"{path}: its pickled objects cannot be read ({type(error).__name__}: {error}); use the code that "
                "wrote them, or begin a new run"
            ) from error

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


PLAIN_TYPES = (bool, int, float, str, bytes, torch.Size)
KEY_TYPES = (bool, int, float, str, tuple)  # of the keys of mappings


def to_plain_data(value: Any, place: str, *, pickles: bool) -> Any:
    """Return the content of a checkpoint as tensors and plain data.

    Args:
        value: the content, or a part of it.
        place: the path of the part, for messages.
        pickles: pickle everything else, so that it is restored unchanged. Otherwise arrays become tensors, and special
            mappings and tuples become plain ones.

    Raises:
        TypeError: names a value that is neither tensors nor plain data, or that cannot be pickled.
    """
    kind = type(value)
    if (
        isinstance(value, Tensor)
        or value is None
        or kind in PLAIN_TYPES
        or isinstance(value, torch.dtype | torch.device)
    ):
        return value
    if isinstance(value, np.generic) and type(value.item()) in PLAIN_TYPES:
        return value.item()
    if isinstance(value, Mapping) and (kind in (dict, OrderedDict, Counter) or not pickles):
        if all(type(key) in KEY_TYPES for key in value):
            named = ((key, f"{place}.{key}" if place else str(key)) for key in value)
            items = {key: to_plain_data(value[key], where, pickles=pickles) for key, where in named}
            return kind(items) if kind in (OrderedDict, Counter) else items
    elif isinstance(value, list | tuple) and (kind in (list, tuple) or not pickles):
        parts = [to_plain_data(part, f"{place}[{i}]", pickles=pickles) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    elif isinstance(value, np.ndarray) and not pickles and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if pickles:
        return pickle_object(value, place)
    keys = {type(key).__name__ for key in value if type(key) not in KEY_TYPES} if isinstance(value, Mapping) else set()
    what = f"has keys of type {', '.join(sorted(keys))}" if keys else f"is a {kind.__name__}"
    raise TypeError(f"{place} {what}, and a checkpoint holds tensors and plain data only")


def pickle_object(value: Any, place: str) -> dict[str, bytes]:
    """Return an object as plain data that `unpickle_objects` restores.

    Raises:
        TypeError: it cannot be pickled.
    """
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception as error:  # an object's own pickling may raise anything
        raise TypeError(f"{place} is a {type(value).__name__} that cannot be pickled ({error})") from error
    return {PICKLED: file.getvalue()}


def has_objects(value: Any) -> bool:
    """Return whether the content of a checkpoint has pickled objects."""
    if isinstance(value, Mapping):
        return value.keys() == {PICKLED} or any(map(has_objects, value.values()))
    return isinstance(value, list | tuple) and any(map(has_objects, value))


def unpickle_objects(value: Any) -> Any:
    """Return the content of a checkpoint with its pickled objects restored. This may execute code."""
    if isinstance(value, dict):
        if value.keys() == {PICKLED}:
            return torch.load(io.BytesIO(value[PICKLED]), map_location="cpu", weights_only=False)
        for key in value:
            value[key] = unpickle_objects(value[key])
        return value
    if type(value) in (list, tuple):
        return type(value)(map(unpickle_objects, value))
    return value


def model_weights(checkpoint: dict[str, Any], prefix: str = "model.") -> dict[str, Tensor]:
    """Return the weights of a task's model by the model's own names; empty if the checkpoint has none."""
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    named = weights if isinstance(weights, dict) else {}
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in named.items()
        if isinstance(name, str) and name.startswith(prefix)
    }
