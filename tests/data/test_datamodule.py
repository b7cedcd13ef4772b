"""What every data set promises: the same batches for the same seed, disjoint splits, and a record of what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from ablab.data.batch import Batch, Samples
from ablab.data.datamodule import DataModule
from ablab.data.digit_scenes import DigitScenes
from ablab.data.digits import Digits
from ablab.data.digits_rows import DigitsRows
from ablab.data.japanese_vowels import JapaneseVowels
from ablab.data.labelled import OfficialSplits, mean_and_std, stratified_holdout
from ablab.data.mnist5k import MNIST5k
from ablab.data.synthetic import SyntheticImages
from ablab.data.text import Text
from ablab.data.token_stream import Windows
from ablab.lab.config.build import build

Make = Callable[..., DataModule]


@pytest.fixture
def make(config: Callable[..., DictConfig], data_words: Callable[[str], list[str]]) -> Make:
    def make(choice: str, *words: str, **settings: Any) -> DataModule:
        cfg = config(*data_words(choice), *words).data
        for name, value in settings.items():  # composed once for all of them
            cfg[name] = value
        data = build(cfg)
        data.setup()
        return data

    return make


def contents(data: DataModule, part: str) -> list[Any]:
    """Each sample of a split, by its content."""
    assert data.splits is not None
    split = getattr(data.splits, part)
    if data.kind == "vectors":  # standardized by the training rows, which differ between folds
        return split.digests.tolist()
    batch = split[range(len(split))]
    return [inputs.numpy().tobytes() for inputs in batch.inputs]


def same(first: Batch, second: Batch) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def test_every_data_set_gives_batches_of_the_shapes_that_it_promises(make: Make, data_choice: str) -> None:
    data = make(data_choice)
    batch, sizes = data.example(1), data.model_sizes
    if data.kind == "images":
        assert batch.inputs.shape[:2] == (8, sizes["in_channels"])
    elif data.kind == "masks":
        assert batch.inputs.shape == (8, sizes["in_channels"], *batch.targets.shape[1:])
        assert batch.inputs.dtype == torch.float32
        assert batch.targets.dtype == torch.int64
        assert set(batch.targets.unique().tolist()) <= {*range(sizes["num_classes"]), 255}
        assert len(data.task_sizes["pixel_classes"]) == sizes["num_classes"]
        return
    elif data.kind == "sequences":
        assert batch.inputs.shape == (8, sizes["context_length"], sizes["in_features"])
    elif data.kind == "vectors":
        assert batch.inputs.shape == (8, sizes["in_features"])
        assert batch.inputs.dtype == torch.float32
        assert len(data.names()) == sizes["num_outputs"]
        if "class_names" not in data.task_sizes:
            assert batch.targets.shape == (8, sizes["num_outputs"])
            assert batch.targets.dtype == torch.float32
            return
        sizes = {**sizes, "num_classes": sizes["num_outputs"]}
    else:
        assert batch.inputs.shape == batch.targets.shape == (8, sizes["context_length"])
        assert int(batch.inputs.max()) < sizes["vocab_size"]
    if data.kind != "text":
        assert batch.inputs.dtype == torch.float32
        assert batch.targets.shape == (8,)
        assert set(batch.targets.tolist()) <= set(range(sizes["num_classes"]))
        assert len(data.task_sizes["class_names"]) == sizes["num_classes"]


def test_workers_do_not_change_the_batches(make: Make, data_choice: str) -> None:
    alone, two = (make(data_choice, num_workers=workers) for workers in (0, 2))
    pairs = list(zip(range(4), two.train_dataloader(), alone.train_dataloader(), strict=False))
    assert len(pairs) == 4
    assert all(same(a, b) for _, a, b in pairs)


def test_a_single_worker_changes_no_batch(make: Make) -> None:
    alone, one = (make("digits", num_workers=workers) for workers in (0, 1))
    assert all(same(a, b) for a, b in zip(alone.train_dataloader(), one.train_dataloader(), strict=True))


def test_two_setups_have_one_fingerprint_and_another_split_has_another(make: Make, data_choice: str) -> None:
    first, second = make(data_choice), make(data_choice)
    assert first.fingerprint == second.fingerprint
    assert first.record() == {"fingerprint": first.fingerprint, **{n: len(s) for n, s in vars(first.splits).items()}}
    assert make(data_choice, folds=3).fingerprint != first.fingerprint


def test_folds_are_disjoint_and_cover_what_is_not_for_testing(make: Make, data_choice: str) -> None:
    folds = [make(data_choice, folds=3, fold=fold) for fold in range(3)]
    parts = [set(contents(data, "val")) for data in folds]
    everything = set(contents(folds[0], "val")) | set(contents(folds[0], "train"))
    for data, part in zip(folds, parts, strict=True):
        assert contents(data, "test") == contents(folds[0], "test")
        if data.kind == "text":  # windows that a cut runs through differ
            continue
        assert not part & set(contents(data, "train"))
        assert part | set(contents(data, "train")) == everything
    if folds[0].kind != "text":
        assert sum(map(len, parts)) == len(everything)


def test_folds_have_the_classes_in_equal_shares() -> None:
    for fold in range(5):
        data = Digits(folds=5, fold=fold)
        data.setup()
        counts = data.splits.val.targets.bincount()  # type: ignore[union-attr]
        assert int(counts.max() - counts.min()) <= 3
        assert len(data.splits.val) in (287, 288)  # type: ignore[union-attr]


@pytest.mark.parametrize("make_data", [Digits, DigitScenes, DigitsRows, MNIST5k, JapaneseVowels])
def test_no_sample_is_in_two_splits_by_its_content(make_data: Callable[[], DataModule]) -> None:
    data = make_data()
    data.setup()
    train, val, test = (set(contents(data, part)) for part in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test


def test_copies_of_a_sample_stay_in_one_part() -> None:
    class Doubled(Digits):
        def load(self) -> OfficialSplits:
            official = super().load()
            assert isinstance(official.train, Samples)
            inputs, targets, *_ = official.train.as_batch()
            return OfficialSplits(Samples(inputs.repeat(2, 1, 1, 1), targets.repeat(2)), official.test)

    for settings in ({}, {"folds": 4, "fold": 2}):
        data = Doubled(**settings)
        data.setup()
        train, val = contents(data, "train"), contents(data, "val")
        assert not set(train) & set(val)
        assert len(train) + len(val) == 2 * 1437
        assert len(set(val)) * 2 == len(val)


def test_test_digits_are_always_the_same_and_validation_follows_its_seed() -> None:
    first, second = Digits(split_seed=0, seed=0), Digits(split_seed=1, seed=1)
    first.setup()
    second.setup()
    assert contents(first, "test") == contents(second, "test")
    assert contents(first, "val") != contents(second, "val")
    assert [len(contents(first, part)) for part in ("train", "val", "test")] == [1149, 288, 360]


def test_the_standardization_is_the_training_splits() -> None:
    data = Digits()
    data.setup()
    assert data.splits is not None
    everything = data.on_after_batch_transfer(data.splits.train[range(1149)], 0).inputs
    assert everything.mean().abs() < 1e-5
    assert abs(everything.std() - 1) < 1e-3


def test_padding_is_neither_counted_nor_moved_by_the_standardization() -> None:
    data = JapaneseVowels()
    data.setup()
    assert data.splits is not None
    batch = data.on_after_batch_transfer(data.splits.train[range(len(data.splits.train))], 0)
    assert batch.valid is not None
    real = batch.inputs[batch.valid]
    assert real.mean(0).abs().max() < 1e-5
    torch.testing.assert_close(real.std(0, correction=0), torch.ones(12), rtol=0, atol=1e-4)
    assert not batch.inputs[~batch.valid].any()


def test_rows_are_the_same_images() -> None:
    images, rows = Digits(), DigitsRows()
    images.setup()
    rows.setup()
    for part in ("train", "val", "test"):
        assert contents(images, part) == contents(rows, part)


def test_a_holdout_has_the_classes_in_equal_shares() -> None:
    targets = torch.arange(1000) % 10
    kept, held_out = stratified_holdout(targets, 0.2, seed=3)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(1000))
    assert targets[held_out].bincount().tolist() == [20] * 10


@pytest.mark.parametrize(
    ("make_data", "message"),
    [
        (lambda: Digits(batch_size=0), "batch_size=0: a batch has at least one sample"),
        (lambda: Digits(micro_batch_size=0), "micro_batch_size=0: a forward pass has at least one sample"),
        (lambda: Digits(num_workers=-1), "num_workers=-1: use 0"),
        (lambda: Digits(batch_size=1150).setup(), "batch_size=1150 is more than the 1149 training samples"),
        (lambda: Digits(val_fraction=0.999).setup(), "val_fraction=0.999: both parts"),
        (lambda: Digits(split_seed=-1), "split_seed=-1: a seed is 0 or more"),
        (lambda: Digits(fold=2), "fold=2: say of how many, for example data.folds=5"),
        (lambda: Digits(folds=1), "folds=1: at least 2 are needed"),
        (lambda: SyntheticImages(num_classes=0), "num_classes=0: at least 1 is needed"),
        (lambda: Text(test_fraction=0.9999, val_fraction=0.00005).setup(), "the text has .* tokens, and its parts"),
        (lambda: Digits(folds=5, fold=5), "fold=5: the 5 folds have the numbers 0 to 4"),
        (lambda: Digits(folds=500).setup(), "folds=500: class 8 has only 139 different training samples"),
        (
            lambda: Digits(val_fraction=1.5).setup(),
            "val_fraction=1.5: both parts of 1437 different samples need each of the 10 classes; choose a fraction",
        ),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make_data: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 1, 2, 7, 1, 2] * 4, r"the train part has labels that are not from 0 to 2: 7 at row 3, and 3 more"),
        ([0, 1, -1, 1, 0, 1] * 4, r"labels that are not from 0 to 2: -1 at row 2"),
        ([0, 1, 0, 1, 0, 1] * 4, "no training sample has the class c"),
    ],
)
def test_labels_that_make_no_sense_are_refused_with_their_row(targets: list[int], message: str) -> None:
    class Labelled(Digits):
        def load(self) -> OfficialSplits:
            self.class_names = ["a", "b", "c"]
            samples = Samples(torch.arange(len(targets)).view(-1, 1, 1, 1), torch.tensor(targets))
            return OfficialSplits(samples, samples)

    with pytest.raises(ValueError, match=message):
        Labelled().setup()


def test_a_global_batch_must_divide_by_the_processes() -> None:
    data = Digits(batch_size=10)
    data.setup()
    with pytest.raises(ValueError, match="batch_size=10: it is the global batch and does not divide by 4 processes"):
        data.example(4)
    whole = Digits(batch_size="full")
    whole.setup()
    with pytest.raises(
        ValueError, match="batch_size=full: the 1149 training samples do not divide by 2 processes; choose 1148"
    ):
        whole.example(2)


def test_a_rare_class_that_falls_to_one_side_is_refused() -> None:
    targets = torch.tensor([0] * 98 + [1] * 2)
    with pytest.raises(
        ValueError, match=r"val_fraction=0.1: both parts of 100 different samples need each of the 2 classes"
    ):
        stratified_holdout(targets, 0.1, 0)


def test_a_constant_feature_is_only_centered() -> None:
    constant = Samples(torch.full((10, 2, 3), 7.0), torch.zeros(10))
    mean, std = mean_and_std(constant, (2,))
    assert mean.flatten().tolist() == [7, 7, 7]
    assert std.flatten().tolist() == [1, 1, 1]


def test_no_loader_draws_from_the_global_random_numbers(make: Make, data_choice: str) -> None:
    """Or the number of workers, and how often one validates, would change a run's dropout."""
    for workers in (0, 2):
        data = make(data_choice, num_workers=workers)
        before = torch.get_rng_state()
        for loader in (data.train_dataloader(), data.val_dataloader()):
            next(iter(loader))
        assert torch.equal(torch.get_rng_state(), before)


def test_what_numbers_stand_for_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    prints = []
    for letter in "oé":
        (tmp_path / "a.txt").write_text("tx be xr nxt tx be ".replace("x", letter) * 60)
        data = Text(path=str(tmp_path / "a.txt"), context_length=16, batch_size=8)
        data.setup()
        prints.append(data.fingerprint)
    assert prints[0] != prints[1]


# Full batches and parts of batches ---------------------------------------------------------------------------------


def test_a_full_batch_is_the_whole_training_split() -> None:
    data = Digits(batch_size="full")
    data.setup()
    [batch] = data.train_dataloader()
    assert len(batch.targets) == 1149
    assert sum(len(batch.targets) for batch in data.test_dataloader()) == 360


@pytest.mark.parametrize(
    ("size", "largest", "sizes"), [(10, 4, [4, 3, 3]), (8, 8, [8]), (9, None, [9]), (3, 1, [1] * 3)]
)
def test_a_batch_is_parted_as_evenly_as_possible(size: int, largest: int | None, sizes: list[int]) -> None:
    batch = Batch(torch.arange(size), torch.arange(size), valid=torch.ones(size, 2))
    parts = batch.parts(largest)
    assert [len(part.targets) for part in parts] == sizes
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert all(part.valid is not None and part.seeds is None for part in parts)
    data = Digits(batch_size=size, micro_batch_size=largest)
    data.setup()
    assert len(data.example(1).targets) == min(sizes)


def test_a_batch_in_parts_trains_as_the_whole(run: Callable[..., Any], last_weights: Callable[..., Any]) -> None:
    """1,149 samples in parts of at most 200 have unequal sizes; the gradients must still be the whole batch's."""
    words = ["data.batch_size=full", "norm=groupnorm", "trainer.precision=64-true", "trainer.max_epochs=2"]
    words += [f"trainer.limit_{part}_batches=1.0" for part in ("train", "val", "test")] + ["trainer.max_steps=2"]
    words += ["data/augment=crop_flip", "data.augment.crop_padding=1", "data.augment.mixup=1"]
    whole, parts = run(*words), run(*words, "data.micro_batch_size=200")
    assert parts.metrics["test/loss"] == pytest.approx(whole.metrics["test/loss"], rel=1e-6)
    found = last_weights(parts.folder)
    for name, value in last_weights(whole.folder).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


# Resume ------------------------------------------------------------------------------------------------------------


class Listening(L.LightningModule):
    """Learns nothing but remembers the batches that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, Batch]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step, batch))
        return self.weight * 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: DataModule, folder: Path, *, resume: str | None = None) -> Listening:
    """Train, with a checkpoint after each step."""

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
            trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    listener = Listening()
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[Saving()] if resume is None else [],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(listener, datamodule=data, ckpt_path=resume, weights_only=True)
    return listener


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize(
    ("choice", "workers", "every"),
    [
        *((choice, 0, False) for choice in ("digits", "text", "hf_image")),
        *((choice, 2, False) for choice in ("digits", "hf_image")),
        pytest.param("text", 2, False, marks=pytest.mark.thorough),
        *(pytest.param(choice, 0, True, marks=pytest.mark.thorough) for choice in ("digits", "text", "hf_image")),
    ],
)
def test_a_resume_at_any_step_goes_on_with_the_same_batches(
    make: Make, choice: str, workers: int, every: bool, tmp_path: Path
) -> None:
    size = {"digits": 250, "text": 500, "hf_image": 70}[choice]
    words = [f"data.num_workers={workers}", f"data.batch_size={size}"]
    words += ["data/augment=crop_flip", "data.augment.mixup=0.5"] if choice != "text" else []
    words += (
        ["data.streaming=true", "data.val_split=validation", "data.shuffle_block=60"] if choice == "hf_image" else []
    )
    whole = fit(make(choice, *words), tmp_path).seen
    steps = [step for step, _ in whole]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 6
    for step in steps[1:] if every else (1, len(steps) // 2, len(steps) - 1):
        rest = fit(make(choice, *words), tmp_path, resume=f"{tmp_path}/{step}.ckpt").seen
        assert [step for step, _ in rest] == steps[step:]
        assert all(same(a, b) for (_, a), (_, b) in zip(rest, whole[step:], strict=True))


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_resume_with_other_data_is_refused(make: Make, tmp_path: Path) -> None:
    fit(make("digits", "data.batch_size=500"), tmp_path)
    with pytest.raises(ValueError, match="the checkpoint was trained on other data"):
        fit(make("digits", "data.batch_size=500", "data.split_seed=1"), tmp_path, resume=f"{tmp_path}/1.ckpt")
    with pytest.raises(ValueError, match="batch_size=250: the checkpoint was written with 500, and other batches"):
        fit(make("digits", "data.batch_size=250"), tmp_path, resume=f"{tmp_path}/1.ckpt")


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_resume_with_another_vocabulary_names_the_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 60)
    (tmp_path / "b.txt").write_text("to see or not to sée " * 60)
    settings: dict[str, Any] = {"context_length": 16, "batch_size": 30}
    fit(Text(path=str(tmp_path / "a.txt"), **settings), tmp_path)
    message = "another vocabulary, of 7 tokens; this text's has also 's', 'é'; and lacks 'b'; give the text"
    with pytest.raises(ValueError, match=message):
        fit(Text(path=str(tmp_path / "b.txt"), **settings), tmp_path, resume=f"{tmp_path}/1.ckpt")


def test_every_token_of_a_fold_is_before_the_test_part() -> None:
    streams = []
    for fold in range(3):
        data = Text(folds=3, fold=fold, context_length=16)
        data.setup()
        assert data.splits is not None
        assert isinstance(data.splits.train, Windows)
        assert isinstance(data.splits.val, Windows)
        streams.append((data.splits.train.stream, data.splits.val.stream))
    whole = torch.cat([val for _, val in streams])
    for fold, (train, val) in enumerate(streams):
        rest = torch.cat([other for number, (_, other) in enumerate(streams) if number != fold])
        assert torch.equal(train, rest)
        assert len(val) == pytest.approx(len(whole) / 3, abs=1)
