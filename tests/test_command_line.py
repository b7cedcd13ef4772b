"""The command line as a user meets it: other processes, other folders, every message read."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]

# What is answered before torch is loaded.
TYPOS = [
    (
        ["norm=gruopnorm"],
        "norm=gruopnorm: there is no such choice; did you mean groupnorm? norm has: batchnorm, ",
    ),
    (
        ["experiment=char_lsmt"],
        "experiment=char_lsmt: there is no such choice; did you mean char_lstm? experiment has: char_lstm, ",
    ),
    (
        ["norm=groupnorm", "norm.num_group=4"],
        "norm.num_group: there is no such key; did you mean num_groups? norm has: affine, eps, group_size, "
        "image_scope, num_groups, sequence_scope, weight",
    ),
    (
        ["norm.momentun=1"],
        "norm.momentun: there is no such key; did you mean momentum? norm has: affine, d_max, eps, ",
    ),
    (
        ["data.batchsize=8"],
        "data.batchsize: there is no such key; did you mean batch_size? data has: augment, batch_size, ",
    ),
    (["sed=1"], "sed: there is no such key; did you mean seed? the top level has: callbacks, data, "),
    (["nrom=groupnorm"], "nrom: there is no such key; did you mean norm? the top level has: "),
    (["+norm.num_groups=3"], "norm.num_groups: BatchNorm takes no such argument; "),
    (["data.batch_size=abc"], "data.batch_size=abc: a whole number or full is needed"),
    (["model=rnn", "model.cell=lstn"], "model.cell=lstn: elman or gru or lstm is needed"),
    (["~norm"], "norm: it is missing; a run needs one"),
    (["model=null"], "Config group override must be a string or a list. Got NoneType"),
    (["norm=groupnorm", "norm.image_scope=pixel"], "norm.image_scope=pixel: sample or position is needed"),
    (["data.batch_size=[1"], "data.batch_size=[1: not of the form key=value ("),
]

# What needs torch, and is still answered before any training.
WRONG_VALUES = [
    (["data.batch_size=0"], "data.batch_size=0: a batch has at least one sample"),
    (
        ["data.batch_size=5000"],
        "data.batch_size=5000 is more than the 1149 training samples; choose a smaller one",
    ),
    (["optimizer.lr=-0.1"], "optimizer.lr=-0.1: a number is needed that is finite and not negative"),
    (
        ["model.depth=21"],
        "model.depth=21: a CIFAR-style ResNet has depth 6n + 2 (8, 14, 20, 26, 32, …); the nearest is 20",
    ),
    (
        ["norm=groupnorm", "norm.num_groups=32"],
        "norm: num_groups=32 does not divide 16 features; divisors are 1 2 4 8 16; set norm.num_groups=16 (at ",
    ),
    (
        ["model=rnn", "norm=instancenorm"],
        "norm: inside a recurrence, where a step stands alone, the mean and variance ",
    ),
    (
        ["model=transformer", "data=text", "norm=batchnorm"],
        "norm: a mean and variance over the batch and all positions would leak the future into a causal model; choose "
        "a norm whose statistics stay within a step (at blocks.0.norm1, blocks.0.norm2, blocks.1.norm1, "
        "blocks.1.norm2, norm of the model)\nnorm: defined everywhere in this model, as they are: dyt, ",
    ),
    (
        ["model=resnet18", "norm=instancenorm"],
        "norm: an input of shape (32, 128, 1, 1) leaves a single value for each mean and variance over all positions",
    ),
    (
        ["model=transformer", "norm/weight=weight_standardization"],
        "norm: norm/weight: weight standardization is for convolutions, and this model has none; choose ",
    ),
    (
        ["model=transformer", "model/qk_norm=layernorm", "model.num_heads=64"],
        "norm: the mean and variance of each feature would be taken over a single value, and the output would not "
        "depend on how large it is; choose a norm over several features or over the batch (at blocks.0.attention.norm_",
    ),
    (["+trainer.sync_batchnorm=true"], "trainer.sync_batchnorm=true: it converts torch's own layers"),
    (["+model.num_classes=5"], "model.num_classes: the program itself gives it, from the rest of the config; leave it"),
    (["+trainer.use_distributed_sampler=true"], "trainer.use_distributed_sampler: the program itself gives it"),
    (
        ["monitor.metric=val/loss"],
        "monitor.mode=max: it would keep the worst val/loss; set monitor.mode=min",
    ),
    (["trainer.limit_test_batches=0"], "trainer.limit_test_batches=0: more than 0 is needed"),
    (["trainer.val_check_interval=0"], "trainer.val_check_interval=0: more than 0 is needed"),
    (["trainer.max_epochs=null"], "trainer.max_epochs=null: say how many, or -1 for no limit"),
    (["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn: what its processes find"),
    (["optimizer.lr=abc"], "optimizer.lr=abc: "),
    (["trainer.accelerator=null"], "trainer.accelerator=None: there is no such accelerator; "),
    (
        ["scheduler=one_cycle", "scheduler.base_momentum=0.95"],
        "scheduler.base_momentum=0.95: it is reached from the optimizer's own momentum, 0.9, and is at most that",
    ),
    (
        ["model=resnet", "data=digits_rows"],
        "model: ResNet reads images, and DigitsRows gives sequences; choose data=cifar10|cifar100|digits|"
        "hf_image|imagefolder|mnist5k|synthetic_images for this model, "
        "or model=rnn|transformer for this data",
    ),
    (
        ["data=cifar10", "data.root=/no/such"],
        "data.root=/no/such: there is no such folder; give one with the parquet",
    ),
    (
        ["data=text", "model=rnn", "data.path=/no/such"],
        "data.path=/no/such: there is no such file or folder; give a",
    ),
    (
        ["trainer.accelerator=tpu"],
        "trainer.accelerator=tpu: this machine has none, or torch cannot see it; choose ",
    ),
    (
        ["trainer.accelerator=gpux"],
        "trainer.accelerator=gpux: there is no such accelerator; lightning has: cpu, ",
    ),
    (
        ["trainer.accelerator=cpu", "trainer.devices=3", "trainer.strategy=ddp"],
        "data.batch_size=32: it is the global",
    ),
    (["trainer.precision=12"], "trainer: Precision 12 is invalid"),
    (["seed=-1"], "seed: -1 is not in bounds"),
    (["name=../elsewhere"], "name=../elsewhere: it ends the name of the run's folder and is a word, not a path"),
    (["output_dir=/proc/runs"], "output_dir=/proc/runs: no folder can be made there (No such file or directory)"),
    (["optimizer.lr=nan"], "optimizer.lr=nan: a number is needed that is finite and not negative"),
    (["model=transformer", "model.num_heads=0"], "model.num_heads=0: at least 1 is needed"),
    (["data.val_fraction=0.999"], "data.val_fraction=0.999: both parts of 1437 different samples need each of the 10"),
    (
        ["task=language_modeling"],
        "task: LanguageModeling does not go with Digits, which gives class_names; leave task=",
    ),
    (
        ["monitor.metric=val/acc"],
        "monitor.metric=val/acc: did you mean val/accuracy? Classification has: val/accuracy, ",
    ),
    (
        ["trainer.max_epochs=-1"],
        "trainer.max_epochs=-1, trainer.max_steps=-1: a schedule needs an end; set one of them",
    ),
    (["data=hf_image"], "data.name=null, root=null: say which data set of the Hub, or give a folder"),
    (["data=imagefolder"], "data.root: it has no default; give one, data.root=…"),
    (["data.folds=1"], "data.folds=1: at least 2 are needed"),
    (["data.augment.mixup=-1"], "data.augment.mixup=-1: 0 (off) or more is needed"),
    (["data/shift=contrast", "data.shift.severity=6"], "data.shift.severity=6: a whole number from 1 to 5 is needed"),
    (["data/shift=time_warp"], "data: shift: TimeWarp is for sequences, and Digits gives images; choose another"),
    (["data.classes_per_batch=3"], "data.classes_per_batch=3: it does not divide batch_size=32 into equal parts"),
    (
        ["data/augment=crop_flip", "data.augment.crop_padding=8"],
        "data.augment.crop_padding=8: images of 8x8 have fewer pixels to pad with",
    ),
    (
        ["+trainer.accumulate_grad_batches=4"],
        "trainer.accumulate_grad_batches=4: data.batch_size is the batch of a step; where it does not fit, "
        "data.micro_batch_size takes it in parts",
    ),
    (
        ["trainer.val_check_interval=1000"],
        "trainer.val_check_interval=1000: an epoch has 35 batches; choose fewer, or ",
    ),
    (["trainer.devices=-1"], "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    (["scheduler.warmup_steps=-1"], "scheduler.warmup_steps=-1: steps cannot be negative; 0 is no warmup"),
]


def assert_refused(result: subprocess.CompletedProcess[str], message: str, folder: Path) -> None:
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(folder.iterdir()), "a refused command leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "message"), TYPOS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_typo_is_answered_with_what_there_is(
    command: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    assert_refused(command(*words), message, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"), WRONG_VALUES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_value_is_refused_before_any_training(
    command: Command, tmp_path: Path, words: list[str], message: str
) -> None:
    assert_refused(command(*words), message, tmp_path)


def test_the_norms_that_would_fit_are_those_that_do(command: Command) -> None:
    result = command("model=transformer", "norm=groupnorm_weightstandardization")
    *_, fitting = result.stderr.strip().splitlines()
    assert fitting.startswith("norm: defined everywhere in this model, as they are: batchnorm, batchnorm_weightnorm, ")
    assert "standardization" not in fitting


@pytest.mark.slow
def test_a_synchronized_batch_of_two_processes_is_counted_whole(command: Command) -> None:
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2", "logger=csv")
    steps = ("trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
    assert command("model=rnn", "norm=batchnorm", *two, *steps).returncode == 2  # one value on each process
    result = command("model=rnn", "norm=syncbatchnorm", *two, *steps)
    assert result.returncode == 0, result.stderr


def test_several_processes_in_a_sweep_are_refused(command: Command) -> None:
    result = command("-m", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert result.returncode == 2
    assert "trainer: 2 processes for each run of a sweep (-m) are not supported yet; start one" in result.stderr


def test_a_typo_in_an_experiment_file_is_found(command: Command, tmp_path: Path) -> None:
    extra = tmp_path / "more"
    (extra / "experiment").mkdir(parents=True)
    (extra / "experiment" / "mine.yaml").write_text("# @package _global_\nsed: 1\ntrainer: {max_epoch: 2}\n")
    result = command("experiment=mine", f"hydra.searchpath=[file://{extra}]")
    assert result.returncode == 2
    assert "sed: there is no such key; did you mean seed?" in result.stderr
    assert "trainer.max_epoch: Trainer takes no such argument; did you mean max_epochs?" in result.stderr


def test_a_traceback_can_be_asked_for(command: Command) -> None:
    result = command("data.batch_size=0", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "data.batch_size=0: a batch has at least one sample" in result.stderr


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"], ["norm=gruopnorm"], ["data.batch_size=abc"]])
def test_torch_is_not_loaded_to_help_or_to_refuse(command: Command, words: list[str]) -> None:
    result = command(*words, PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "hydra" in loaded
    assert not {"torch", "lightning", "wandb", "sklearn"} & loaded


def test_help_fits_on_a_screen_and_lists_every_choice(command: Command) -> None:
    result = command("--help")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    for word in (
        "norm=",
        "groupnorm",
        "transformer",
        "digits_rows",
        "adamw",
        "one_cycle",
        "ddp",
        "data.batch_size=8",
    ):
        assert word in result.stdout
