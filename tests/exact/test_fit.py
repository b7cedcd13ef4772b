"""Trainings of modules that were not written for this project, resumed from each of their checkpoints."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.demos.boring_classes import (
    BoringDataModule,
    BoringDataModuleNoLen,
    BoringModel,
    DemoModel,
    IterableBoringDataModule,
    ManualOptimBoringModel,
)
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.demos.transformer import LightningTransformer
from PIL import Image
from tests.exact import guests
from tests.exact.resuming import quiet_trainer, resume_everywhere, train
from torch.utils.data import DataLoader

from ablab.disk import Lock
from ablab.errors import ConfigError, RunError, Stopped
from ablab.lab.exact.fit import fit
from ablab.lab.exact.loaders import digest_of
from ablab.lab.run import signals
from ablab.lab.run.checkpoint_files import VerifiedFiles, list_checkpoints

FEW: dict[str, Any] = {"limit_train_batches": 6, "limit_val_batches": 2}

# Lightning's own demonstrations, as they are.
DEMOS: dict[str, Callable[[], Any]] = {
    "BoringModel": lambda: (BoringModel(), None),
    "DemoModel": lambda: (DemoModel(), BoringDataModule()),
    "ManualOptimBoringModel": lambda: (ManualOptimBoringModel(), BoringDataModule()),
    "IterableBoringDataModule": lambda: (guests.SumOfInputs(), IterableBoringDataModule()),
    "BoringDataModuleNoLen": lambda: (BoringModel(), BoringDataModuleNoLen()),
}


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("name", DEMOS)
def test_lightnings_demos_resume_at_any_step_to_the_same_bits(name: str, tmp_path: Path) -> None:
    assert resume_everywhere(DEMOS[name], tmp_path, **FEW) >= 12


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at_most"), [(LightningLSTM, 2), (LightningTransformer, 100)])
def test_lightnings_language_models_resume_to_the_same_bits(
    kind: Any, at_most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first keeps its hidden state in a plain attribute; a step of it takes seconds, so only some are tried."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    text = "\n".join(topics[name] for name in sorted(topics))[:20_000]  # in place of the text that it would download
    (tmp_path / "data" / "wikitext-2.txt").write_text(text)
    size = len(set(text.split())) + 10
    few = {"limit_train_batches": 3}
    assert resume_everywhere(lambda: (kind(vocab_size=size), None), tmp_path, at_most=at_most, **few) >= 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_metrics_means_attributes_and_schedules_go_on(num_workers: int, tmp_path: Path) -> None:
    def make() -> Any:
        return guests.Regression(), guests.NoiseData(num_workers=num_workers)

    assert resume_everywhere(make, tmp_path, at_most=100 if num_workers == 0 else 5, max_epochs=3) >= 5


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    def make(num_workers: int) -> Any:
        return lambda: (guests.Regression(), guests.NoiseData(num_workers=num_workers))

    resume_everywhere(make(0), tmp_path, at_most=3, again=make(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 4},
        {"accumulate_grad_batches": 4, "val_check_interval": 2},
        {"overfit_batches": 3},
        {"val_check_interval": 2, "gradient_clip_val": 0.5},
        {"reload_dataloaders_every_n_epochs": 1},
        {"max_steps": 9, "max_epochs": -1},
        {"max_steps": 9, "max_epochs": -1, "val_check_interval": 2},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_lightnings_options_work(settings: dict[str, Any], tmp_path: Path) -> None:
    assert resume_everywhere(lambda: (guests.Regression(), guests.NoiseData()), tmp_path, **settings) >= 6


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
def test_several_optimizers_and_gradients_kept_by_hand_go_on(tmp_path: Path) -> None:
    assert resume_everywhere(lambda: (guests.GAN(), guests.NoiseData()), tmp_path) >= 12


WITH_WORKERS_TOO = ["combined", "own_batches", "own_way", "unbatched"]
KINDS = ["two", "own_order", "stream", *WITH_WORKERS_TOO, "batches"]  # the last is no loader


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [
        *((kind, 0) for kind in KINDS),
        *((kind, 2) for kind in ("two", "own_order", "stream")),
        *(pytest.param(kind, 2, marks=pytest.mark.thorough) for kind in WITH_WORKERS_TOO),
    ],
)
def test_any_loaders_are_entered_in_the_middle(kind: str, num_workers: int, tmp_path: Path) -> None:
    def make() -> Any:
        return guests.SumOfInputs(), guests.Loaders(kind, num_workers)

    resume_everywhere(make, tmp_path, at_most=100 if num_workers == 0 else 3)


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
def test_frozen_parts_stay_frozen(tmp_path: Path) -> None:
    assert resume_everywhere(lambda: (guests.Freezes(), guests.NoiseData()), tmp_path) >= 12


def test_layers_that_are_made_late_resume(tmp_path: Path) -> None:
    resume_everywhere(lambda: (guests.MakesLayersLate(), DataLoader(guests.Rows(12), 3)), tmp_path)


class StopAt(L.Callback):
    """Asks for a stop in a batch, as a signal would."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            signals.requested = signal.SIGTERM


@pytest.mark.parametrize("batch", range(11))
def test_a_stop_in_any_batch_of_an_accumulation_goes_on_to_the_same_bits(batch: int, tmp_path: Path) -> None:
    def make() -> Any:
        return guests.Regression(), guests.NoiseData()

    settings: dict[str, Any] = {"accumulate_grad_batches": 4}
    weights, rows = train(make, tmp_path / "whole", every_n_steps=None, **settings)
    with suppress(Stopped):
        train(make, tmp_path / "stopped", every_n_steps=None, callbacks=[StopAt(batch)], **settings)
    found, found_rows = train(make, tmp_path / "stopped", every_n_steps=None, **settings)
    assert found_rows == rows
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_module_is_left_as_it_was_after_an_interruption(tmp_path: Path) -> None:
    module, data = guests.Regression(), guests.NoiseData()
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_model_summary=False, log_every_n_steps=1)
    trainer.callbacks.append(StopAt(2))  # type: ignore[attr-defined]
    with pytest.raises(Stopped):
        fit(trainer, module, data, folder=tmp_path)
    assert not [name for owner in (module, data) for name in vars(owner) if name.endswith("_dataloader")]
    with pytest.raises(ConfigError, match="it has trained already"):
        fit(trainer, module, data, folder=tmp_path)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_loaders_beside_a_module_keep_its_validation_and_loaders_of_an_instance_are_wrapped(tmp_path: Path) -> None:
    class Validated(guests.SumOfInputs):
        count = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.count += 1

        def val_dataloader(self) -> Any:
            return DataLoader(guests.Rows(4), 2)

    made = Validated()
    train(lambda: (made, DataLoader(guests.Rows(12), 3)), tmp_path / "again")
    assert made.count == 4
    data = L.LightningDataModule.from_datasets(guests.Rows(12), batch_size=3)
    resume_everywhere(lambda: (guests.SumOfInputs(), data), tmp_path / "datasets")


def test_a_module_may_return_none(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        assert resume_everywhere(lambda: (guests.SometimesNone(), guests.NoiseData()), tmp_path) >= 6


def test_loaders_are_given_as_they_are(tmp_path: Path) -> None:
    resume_everywhere(lambda: (guests.SumOfInputs(), DataLoader(guests.Rows(12), 3, shuffle=True)), tmp_path)


def test_the_batches_are_those_of_plain_lightning_where_nothing_is_drawn(tmp_path: Path) -> None:
    """A training that draws nothing ends with the weights that it has without this project."""
    initial = guests.SumOfInputs().state_dict()
    module = guests.SumOfInputs()
    module.load_state_dict(initial)

    def make() -> Any:
        made = guests.SumOfInputs()
        made.load_state_dict(initial)
        return made, DataLoader(guests.Rows(12), 3)

    weights, _ = train(make, tmp_path / "exact")
    quiet_trainer(max_epochs=2).fit(module, DataLoader(guests.Rows(12), 3))
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


# What cannot be exact is said -----------------------------------------------------------------------------------------


def test_samples_from_a_generator_of_their_own_are_said_at_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(lambda: (guests.SumOfInputs(), guests.OwnNoiseData()), tmp_path)
    said = capfd.readouterr().err
    assert said == (
        "warning: a resumed run will differ: train: OwnNoise gives other values each time it is read; draw from the "
        "global generators of torch, numpy or random, which are seeded for each batch\n"
    )


def test_data_that_change_are_said_after_the_first_epoch_and_at_the_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def make() -> Any:
        return guests.SumOfInputs(), guests.GrowingData()

    train(make, tmp_path)
    assert "train: Growing has changed in the first epoch; save what changes in the data" in capfd.readouterr().err
    for name in ("00000007-training.ckpt", "00000008-end.ckpt"):
        (tmp_path / "checkpoints" / name).unlink()
    train(make, tmp_path)
    assert "warning: train: after the resume the data give other batches than before" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    from ablab.callbacks.nonfinite import NonFinite
    from ablab.errors import Diverged

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[NonFinite()],
        logger=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    with pytest.raises(Diverged, match=r"step 2 .epoch 0.: the loss is nan"):
        fit(trainer, guests.Diverges(), DataLoader(guests.Rows(12), 3), folder=tmp_path)


def test_objects_in_a_checkpoint_come_back(tmp_path: Path) -> None:
    resume_everywhere(lambda: (guests.HoldsObjects(), DataLoader(guests.Rows(12), 3)), tmp_path)


def test_objects_are_not_read_from_a_folder_that_is_not_trusted(tmp_path: Path) -> None:
    train(lambda: (guests.HoldsObjects(), DataLoader(guests.Rows(12), 3)), tmp_path)
    path = list_checkpoints(tmp_path / "checkpoints")[-1]
    with pytest.raises(RunError, match=r"it holds pickled objects, .* add trust=true"):
        VerifiedFiles(prefix="", keeps_objects=True).load_checkpoint(path)
    own = VerifiedFiles(prefix="", keeps_objects=True, trusted=True).load_checkpoint(path)["own"]
    assert isinstance(own["averages"][0], guests.Average)
    assert isinstance(own["array"], np.ndarray)
    assert own[np.int64(3)] == "a strange key"


def test_an_object_whose_class_is_gone_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(lambda: (guests.HoldsObjects(), DataLoader(guests.Rows(12), 3)), tmp_path)
    monkeypatch.delattr(guests, "Average")
    with pytest.raises(RunError, match=r"its pickled objects cannot be read .*use the code that wrote them"):
        VerifiedFiles(prefix="", trusted=True).load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])


def test_an_object_that_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"own.lock is a lock that cannot be pickled .*give tensors and plain data"):
        train(lambda: (guests.HoldsALock(), DataLoader(guests.Rows(12), 3)), tmp_path)


def test_batches_of_unknown_objects_are_known_again(tmp_path: Path) -> None:
    def make() -> Any:
        return guests.SumOfSlots(), DataLoader(guests.Rows(12), 3, collate_fn=guests.in_slots)

    resume_everywhere(make, tmp_path)
    first, again, other = (digest_of(guests.Slots(torch.full((2,), value))) for value in (1.0, 1.0, 2.0))
    assert first == again != other


class Node:
    """Refers to others of its kind, as atoms do to their neighbors."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.others: list[Node] = []


def graph(value: int) -> list[Node]:
    nodes = [Node(i) for i in range(30)]
    nodes[-1].value = value
    for node in nodes:
        node.others = nodes
    return nodes


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (graph, (0, 1)),
        (lambda word: np.array([word, "b"], dtype=object), ("a", "c")),
        (lambda word: pd.DataFrame({"column": [word]}), ("a", "b")),
        (lambda colour: Image.new("L", (2, 2), colour), (0, 255)),
        (lambda words: set(words), (["a", "b"], ["a", "c"])),
        (lambda value: {"kind": Node, "value": [value, None, 2.5, b"x"]}, (1, 2)),
    ],
    ids=["graph", "array of objects", "data frame", "image", "set", "dict"],
)
def test_the_hash_of_a_batch_is_of_its_content(make: Callable[[Any], Any], values: tuple[Any, Any]) -> None:
    one, other = values
    assert digest_of(make(one)) == digest_of(make(one)) != digest_of(make(other))


def test_a_folder_in_use_or_of_another_module_is_refused(tmp_path: Path) -> None:
    def make() -> Any:
        return guests.SumOfInputs(), DataLoader(guests.Rows(12), 3)

    train(make, tmp_path)
    with pytest.raises(ConfigError, match=r"fits what the code now makes .state_dict: layer.weight has shape"):
        train(lambda: (guests.SumOfInputs(8), None), tmp_path)
    lock = Lock(tmp_path / ".lock")
    assert lock.acquire()
    with pytest.raises(ConfigError, match="another process trains there"):
        train(make, tmp_path)
    lock.release()
