"""A resumed run is the uninterrupted one, to the bit: weights, every logged value, files."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tests.conftest import ROOT
from tests.results import result

from ablab.disk import Lock
from ablab.errors import ConfigError, RunError
from ablab.lab.run import signals
from ablab.lab.run.checkpoint_files import list_checkpoints, read
from ablab.lab.run.folder import read_config, resume_command
from ablab.lab.run.resume import compose_changes, hydra_argv, is_finished, own_overrides, resume_config
from ablab.lab.train import train
from ablab.tasks.task import Task

Start = Callable[..., SimpleNamespace]
Stop = Callable[..., Path | None]

SHORT = ["trainer.limit_val_batches=2", "trainer.limit_test_batches=2", "trainer.log_every_n_steps=1"]
# Between them: augmentation, mixing, parts, averages of weights and of norms, dropout, schedules, each way to validate,
# each way to end, and states saved between validations.
RUNS = {
    "resnet": [
        *("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3", "data/augment=crop_flip"),
        *("data.augment.mixup=0.3", "data.augment.cutmix=0.3", "data.micro_batch_size=12", "callbacks=ema"),
        *("callbacks.ema.decay=0.9", "norm=batchrenorm", "task.per_class=true"),
    ],
    "transformer": [
        *("trainer=cpu", "model=transformer", "data=text", "data.context_length=16", "model.dropout=0.2"),
        *("trainer.max_epochs=-1", "trainer.max_steps=7", "trainer.val_check_interval=3"),
        *("trainer.check_val_every_n_epoch=null", "callbacks.samples.num_tokens=5", "scheduler.warmup_steps=2"),
    ],
    "rnn": [
        *("trainer=cpu", "model=rnn", "model.dropout=0.1", "trainer.max_epochs=3", "trainer.limit_train_batches=3"),
        *("trainer.check_val_every_n_epoch=2", "scheduler=one_cycle", "trainer.gradient_clip_val=0.5"),
        *("callbacks.checkpoints.every_n_steps=2", "data.classes_per_batch=2"),
    ],
}


KINDS = ("training_step", "validation_step", "test_step")


@contextmanager
def counting(passed: Counter[str]) -> Iterator[None]:
    """Count the steps of each kind that a task takes."""

    def counted(name: str, original: Any) -> Any:
        def step(self: Task, *arguments: Any) -> Any:
            passed[name] += 1
            return original(self, *arguments)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in KINDS:
            patch.setattr(Task, name, counted(name, getattr(Task, name)))
        yield


@pytest.fixture(autouse=True)
def _no_signal_is_left() -> Iterator[None]:
    yield
    signals.requested = None


@pytest.fixture
def go_on() -> Callable[[Path], None]:
    from ablab.lab.train import train

    def resume(folder: Path) -> None:
        train(resume_config(OmegaConf.create({"resume": str(folder)})))

    return resume


def spread_of(kind: str, steps: int) -> list[int]:
    """The first and the last of so many steps of a kind, and of training one in the middle."""
    return sorted({1, steps, *([(steps + 1) // 2] if kind == "training_step" else [])})


@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["spread", "every"])
@pytest.mark.parametrize("name", [*RUNS, "stream"])
def test_a_run_stopped_in_any_step_goes_on_to_the_same_bits(
    run: Start, stop: Stop, go_on: Callable[[Path], None], files: Path, name: str, every: bool
) -> None:
    stream = ["trainer=cpu", "trainer.max_epochs=2", "data=hf_image", f"data.root={files}/images", "data.name=digits"]
    stream += ["data.streaming=true", "data.val_split=validation", "data.shuffle_block=60", "data.batch_size=70"]
    words = [*RUNS.get(name, stream), *SHORT]
    passed = Counter[str]()
    with counting(passed):
        expected = result(run(*words).folder)
    assert expected["status"] == "finished"
    places = set()
    for step in KINDS:
        assert passed[step] > 1, "it is stopped in more than one"
        for k in range(1, passed[step] + 1) if every else spread_of(step, passed[step]):
            folder = stop(step, k, *words)
            assert folder is not None
            assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
            places.add(list_checkpoints(folder / "checkpoints")[-1].name)
            go_on(folder)
            assert result(folder) == expected, f"stopped in {step} number {k}"
    assert {name.partition("-")[2] for name in places} == {"training.ckpt", "validation.ckpt", "end.ckpt"}


@pytest.mark.parametrize(("step", "k"), [("training_step", 4), ("validation_step", 2)])
def test_a_schedule_free_run_goes_on_to_the_same_bits(
    run: Start, stop: Stop, go_on: Callable[[Path], None], last_weights: Callable[..., Any], step: str, k: int
) -> None:
    words = ["trainer=cpu", "optimizer=schedulefree_sgd", "trainer.max_epochs=2", "trainer.limit_train_batches=3"]
    done = run(*words, *SHORT)
    folder = stop(step, k, *words, *SHORT)
    assert folder is not None
    go_on(folder)
    assert result(folder) == result(done.folder)
    state = read(list_checkpoints(done.folder / "checkpoints")[0])  # saved before the last validation
    assert state["optimizer_states"][0]["param_groups"][0]["train_mode"]
    assert not torch.equal(state["state_dict"]["model.head.weight"], last_weights(done.folder)["head.weight"])


@pytest.mark.parametrize("optimizer", ["decoupled_sgd", "muon"])
def test_a_speed_run_goes_on_to_the_same_bits(
    run: Start, stop: Stop, go_on: Callable[[Path], None], optimizer: str
) -> None:
    words = ["experiment=cifar10_speedrun", f"optimizer={optimizer}", "trainer=cpu", "data=synthetic_images"]
    words += ["data.num_samples=60", "data.batch_size=20", "trainer.max_steps=7", "model.widths=[24,24,24]"]
    words += ["callbacks.lookahead.start_epoch=0", "callbacks.lookahead.every_n_steps=2", "callbacks.freeze.epoch=1"]
    expected = result(run(*words, *SHORT).folder)
    folder = stop("training_step", 5, *words, *SHORT)
    assert folder is not None
    go_on(folder)
    assert result(folder) == expected


def test_a_run_that_is_resumed_with_other_workers_goes_on_to_the_same_bits(run: Start, stop: Stop) -> None:
    from ablab.lab.train import train

    words = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=4", *SHORT]
    expected = result(run(*words).folder)
    folder = stop("training_step", 2, *words)
    cfg = resume_config(OmegaConf.create({"resume": str(folder)}))
    cfg.data.num_workers = 2
    train(cfg)
    assert folder is not None
    assert result(folder) == expected


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(run: Start, go_on: Callable[[Path], None]) -> None:
    done = run("model=rnn", "data=text", "callbacks.samples.num_tokens=5")
    expected = result(done.folder)
    shutil.rmtree(done.folder / "checkpoints")
    go_on(done.folder)
    assert result(done.folder) == expected


def test_a_run_in_float64_goes_on_to_the_same_bits(run: Start, stop: Stop, go_on: Callable[[Path], None]) -> None:
    words = [
        "trainer=cpu",
        "trainer.precision=64-true",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=4",
        *SHORT,
    ]
    expected = result(run(*words).folder)
    folder = stop("training_step", 2, *words)
    assert folder is not None
    go_on(folder)
    assert result(folder) == expected


def test_a_run_that_died_in_its_first_epoch_has_its_samples_once(run: Start, go_on: Callable[[Path], None]) -> None:
    words = ["model=rnn", "data=text", "data.context_length=16", "callbacks.samples.num_tokens=5"]
    done = run(*words, "trainer.num_sanity_val_steps=1")
    expected = result(done.folder)
    assert expected["samples.txt"].count("--- step") == 1
    shutil.rmtree(done.folder / "checkpoints")
    go_on(done.folder)
    assert result(done.folder) == expected


def test_without_checkpoints_a_signal_stops_the_run_too(stop: Stop, go_on: Callable[[Path], None], run: Start) -> None:
    words = ["callbacks.checkpoints=null", "trainer.max_steps=4", "trainer.limit_train_batches=4"]
    expected = result(run(*words).folder)
    folder = stop("training_step", 2, *words)
    assert folder is not None
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    go_on(folder)
    assert result(folder) == expected


def test_a_checkpoint_of_another_run_is_passed_over(
    run: Start, go_on: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    done, other = run(*words), run(*words, "model.width=8")
    expected = result(done.folder)
    strange = done.folder / "checkpoints" / "00000099-training.ckpt"
    shutil.copy(list_checkpoints(other.folder / "checkpoints")[-1], strange)
    go_on(done.folder)
    assert (
        f"warning: {strange}: it is no checkpoint of this run; falling back to the previous checkpoint"
        in capsys.readouterr().err
    )
    assert result(done.folder) == expected


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_broken_newest_checkpoint_is_passed_over(
    run: Start, go_on: Callable[[Path], None], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    words = ["trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3", *SHORT]
    done = run(*words)
    expected = result(done.folder)
    [before, newest] = list_checkpoints(done.folder / "checkpoints")
    content = bytearray(newest.read_bytes())
    content[len(content) // 3] ^= 16
    newest.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    go_on(done.folder)
    printed = capsys.readouterr()
    assert f"warning: {newest}: " in printed.err
    assert "falling back to the previous checkpoint" in printed.err
    assert f"resumed from {before.name}" in printed.out
    assert result(done.folder) == expected
    assert newest.exists(), "it was written again"
    assert newest.with_suffix(".broken").exists()


def test_in_a_notebook_the_signals_stay_what_they_are(run: Start) -> None:
    handlers = [signal.getsignal(number) for number in signals.SIGNALS]
    run()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == handlers


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume=.*nowhere: it is not a run's folder; there is no run.json in it"):
        resume_config(OmegaConf.create({"resume": str(tmp_path / "nowhere")}))


def test_a_run_from_before_the_project_had_its_name_is_told_so(run: Start) -> None:
    folder = run().folder
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("_target_: ablab.", "_target_: formerly."))
    with pytest.raises(
        ConfigError, match=r"resume=.*: it was made by formerly, which is not here, and this is ablab; "
    ):
        resume_config(OmegaConf.create({"resume": str(folder)}))


def test_a_record_that_is_cut_off_is_named(run: Start) -> None:
    done = run()
    (done.folder / "run.json").write_text('{"status": "fin')
    with pytest.raises(ConfigError, match=r"its run\.json cannot be read .*; bring it back, or begin a new run"):
        is_finished(OmegaConf.create({"resume": str(done.folder)}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{}", r"its run\.json is not what a run writes \(it lacks data, "),
        ("run.json", "[]", r"its run\.json is not what a run writes \(it lacks data, "),
        ("environment.json", None, r"its environment\.json cannot be read \(.*No such file.*\); bring it back"),
        ("environment.json", '{"threads": ', r"its environment\.json cannot be read \(Expecting value"),
        ("config.yaml", "", r"its config\.yaml is not what a run writes \(it lacks callbacks, data, "),
        ("config.yaml", "- model\n", r"its config\.yaml cannot be read .*line 1: keys are needed at the top"),
    ],
)
def test_a_file_that_is_not_what_a_run_writes_is_named(
    stop: Stop, go_on: Callable[[Path], None], name: str, content: str | None, message: str
) -> None:
    folder = stop("training_step", 1, "trainer.max_steps=2", "trainer.limit_train_batches=2")
    assert folder is not None
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        go_on(folder)


def test_best_weights_that_are_gone_are_missed_before_training(stop: Stop, go_on: Callable[[Path], None]) -> None:
    words = ["trainer=cpu", "trainer.max_epochs=3", "trainer.limit_train_batches=1", "trainer.max_steps=3"]
    folder = stop("training_step", 3, *words)
    assert folder is not None
    (folder / "checkpoints" / "best.safetensors").unlink()
    before = (folder / "metrics.csv").read_text()
    with pytest.raises(RunError, match=r"best\.safetensors: it is not there, and has the weights that validation has "):
        go_on(folder)
    assert (folder / "metrics.csv").read_text() == before


def test_where_no_checkpoint_is_sound_the_run_begins_anew_and_says_so(
    run: Start, stop: Stop, go_on: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=1", "trainer.max_steps=2"]
    expected = result(run(*words).folder)
    folder = stop("training_step", 2, *words)
    assert folder is not None
    for file in list_checkpoints(folder / "checkpoints"):
        file.write_bytes(file.read_bytes()[:-100])
    (folder / "checkpoints" / "best.safetensors").unlink()
    capsys.readouterr()
    go_on(folder)
    assert f"warning: no checkpoint of {folder} is sound; the run begins anew" in capsys.readouterr().err
    assert result(folder) == expected


def test_best_weights_that_are_broken_end_the_run_with_a_message(run: Start, go_on: Callable[[Path], None]) -> None:
    done = run()
    file = done.folder / "checkpoints" / "best.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"best\.safetensors: it is cut off, or holds no weights"):
        go_on(done.folder)


def test_a_finished_run_has_nothing_left_to_do(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    done = run()
    assert is_finished(OmegaConf.create({"resume": str(done.folder)}))
    assert "this run has finished, nothing is left to do: val/accuracy 0." in capsys.readouterr().out


def test_a_run_that_is_going_on_is_refused(stop: Stop, go_on: Callable[[Path], None]) -> None:
    folder = stop("training_step", 1, "trainer.max_steps=2", "trainer.limit_train_batches=2")
    assert folder is not None
    lock = Lock(folder / ".lock")
    assert lock.acquire()
    with pytest.raises(ConfigError, match=r"this run is in use by process \d+ on "):
        go_on(folder)
    lock.release()


def test_a_refused_resume_can_be_tried_again_in_the_same_process(stop: Stop, go_on: Callable[[Path], None]) -> None:
    folder = stop("training_step", 1, "trainer.max_steps=2", "trainer.limit_train_batches=2")
    assert folder is not None
    record = json.loads((folder / "run.json").read_text())
    other = {**record, "identity": {**record["identity"], "data": "0123456789abcdef"}}
    (folder / "run.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="the data are not those of the run"):
        go_on(folder)
    (folder / "run.json").write_text(json.dumps(record))
    go_on(folder)


def test_other_data_are_refused(run: Start, stop: Stop, go_on: Callable[[Path], None], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = ["model=rnn", "data=text", f"data.path={text}", "data.context_length=8", "trainer.limit_train_batches=2"]
    folder = stop("training_step", 1, *words, "trainer.max_steps=2")
    assert folder is not None
    text.write_text("the quick brown fox jumps over the lazy cat. " * 200)
    with pytest.raises(ConfigError, match="the data are not those of the run"):
        go_on(folder)


def test_a_finished_run_is_not_taken_for_that_of_other_data(
    run: Start, config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text, animal in zip(texts, ("dog", "cat"), strict=True):
        text.write_text(f"the quick brown fox jumps over the lazy {animal}. " * 200)
    words = ["trainer=smoke", "logger=csv", "model=rnn", "data=text", "data.context_length=8"]
    words += [f"folder={tmp_path / 'mine'}"]
    run(*words, f"data.path={texts[0]}")
    assert is_finished(resume_config(config(*words, f"data.path={texts[0]}")))
    with pytest.raises(ConfigError, match=rf"data\.path: {texts[0]} in the run, {texts[1]} now"):
        resume_config(config(*words, f"data.path={texts[1]}"))


def test_a_folder_that_has_something_else_in_it_is_left_alone(run: Start, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("config.yaml", "metrics.csv"):
        (mine / name).write_text("my own")
    with pytest.raises(
        ConfigError, match=r"mine: the directory is not empty and is not a run \(metrics\.csv\); name a new one"
    ):
        run(f"folder={mine}")
    assert {path.name: path.read_text() for path in mine.iterdir() if path.name != ".lock"} == {
        "config.yaml": "my own",
        "metrics.csv": "my own",
    }


def test_a_run_stays_where_it_is(command: Callable[..., Any], run: Start) -> None:
    folder = run().folder
    done = command(f"resume={folder}", "name=other")
    assert done.stderr == (
        "error: name=other: output_dir, name and folder cannot be changed when resuming; leave it out\n"
    )


TEXT = ["model=rnn", "data=text", "data.context_length=8", "trainer=smoke", "logger=csv"]


@pytest.fixture
def text_run(run: Start, tmp_path: Path) -> SimpleNamespace:
    """A finished run of text that has moved since, as if it had been typed: its `folder`, and where the text is now."""
    old, new = tmp_path / "old.txt", tmp_path / "new place.txt"
    old.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = [*TEXT, f"data.path={old}"]
    folder = run(*words).folder
    old.rename(new)
    type_words(folder, words)
    return SimpleNamespace(folder=folder, new=new)


def type_words(folder: Path, words: list[str] | None) -> None:
    """Change a record as if the words of the run had been typed; None is a run that a program made."""
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "overrides": words}))


def test_overrides_beside_resume_are_composed_on_those_of_the_run(
    command: Callable[..., Any], text_run: SimpleNamespace
) -> None:
    resume, moved = f"resume={text_run.folder}", f"data.path='{text_run.new}'"
    done = command(moved, resume, "trainer.profile=false", "++data.num_workers=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "this run has finished, nothing is left to do" in done.stdout
    typo = command(resume, "data.pth=x")
    assert typo.returncode == 2
    assert "error: data.pth: there is no such key; did you mean path? data has: " in typo.stderr
    assert "context_length" in typo.stderr
    other = command(resume, moved, "model.hidden_size=3", "data.context_length=9")
    assert "it would become another run:\n  data.context_length: 8 in the run, 9 now\n" in other.stderr
    sweep = command("-m", resume, moved)
    assert (sweep.returncode, sweep.stdout) == (2, "")
    assert sweep.stderr == (
        f"error: {resume}: each run of a sweep has its own folder, and the same command goes on with those that are "
        "not done; leave it out\n"
    )
    shown = command(resume, moved, "--cfg", "job", "-p", "data")
    assert yaml.safe_load(shown.stdout)["path"] == str(text_run.new), shown.stderr
    assert "context_length: 8" in shown.stdout


def test_a_run_whose_data_have_moved_goes_on_to_the_same_bits(
    run: Start, stop: Stop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ablab.lab.train import train

    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    words = [*TEXT, f"data.path={old}", "trainer.limit_train_batches=2", "trainer.max_steps=2"]
    expected = result(run(*words).folder)
    folder = stop("training_step", 1, *words)
    assert folder is not None
    old.rename(new)
    type_words(folder, words)
    monkeypatch.setattr("sys.argv", ["train.py", f"data.path={new}", f"resume={folder}", "quiet=true"])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("train", [f"resume={folder}"], return_hydra_config=True))
        assert own_overrides() == [f"resume={folder}", f"data.path={new}", "quiet=true"]
        cfg = resume_config(OmegaConf.create({"resume": str(folder)}))
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    assert cfg.data.path == str(new)
    train(cfg)
    assert result(folder) == expected


def test_of_a_run_that_a_program_made_single_values_can_be_changed(run: Start) -> None:
    folder = run().folder
    type_words(folder, None)
    old = OmegaConf.load(folder / "config.yaml")
    assert isinstance(old, DictConfig)
    new = compose_changes(folder, old, ["data.num_workers=3", "quiet=true", "++trainer.profile=false"])
    assert (new.data.num_workers, new.quiet, new.trainer.profile) == (3, True, False)
    assert old.data.num_workers == 0, "it is a copy"
    for word in ("logger=wandb", "~callbacks.progress", "optimizer.lr=1", "data.roots=x", "data.num_workers=1,2"):
        with pytest.raises(ConfigError, match="was made in a program, not by train"):
            compose_changes(folder, old, [word])


def test_other_loggers_leave_the_settings_of_the_runs_own_behind(run: Start, config: Callable[..., DictConfig]) -> None:
    folder = run().folder
    words = ["trainer=smoke", "logger=wandb", "logger.wandb.mode=offline"]
    type_words(folder, words)
    old = config(*words)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert compose_changes(folder, old, ["logger=csv"]).logger.wandb is None
        assert compose_changes(folder, old, ["data.num_workers=1"]).logger.wandb.mode == "offline"


@pytest.mark.parametrize(
    ("typed", "for_hydra"),
    [
        ("resume=r data.path=x", "resume=r"),
        ("data.path=x +a.b=1 ~c resume=r quiet=true", "resume=r"),
        ("resume='a,b' norm=x", "resume='a,b'"),
        ("++resume=r hydra.verbose=true hydra/x=none x=1", "++resume=r hydra.verbose=true hydra/x=none"),
        ("resume=r data.path", "resume=r data.path"),  # not of the form key=value, as Hydra says
        ("resume=null data.path=x", "resume=null data.path=x"),
        ("folder=r data.path=x", "folder=r data.path=x"),
        ("resume=[ data.path=x", "resume=[ data.path=x"),
        ("resume=r resume=null data.path=x", "resume=r resume=null data.path=x"),
        ("resume_x=r data.path=x", "resume_x=r data.path=x"),
        ("--help", "--help"),
        ("resume=nowhere --cfg job data.path=x", "resume=nowhere --cfg job data.path=x"),
    ],
)
def test_hydra_is_not_given_the_overrides_beside_resume(typed: str, for_hydra: str) -> None:
    assert hydra_argv(["train.py", *typed.split()]) == ["train.py", *for_hydra.split()]


def test_the_command_that_goes_on_can_be_typed(tmp_path: Path) -> None:
    assert resume_command(tmp_path / "a") == f"python train.py resume={tmp_path / 'a'}"
    [_, _, word] = shlex.split(resume_command(tmp_path / "norm=layernorm,seed=0 it's"))
    [parsed] = OverridesParser.create().parse_overrides([word])
    assert parsed.value() == str(tmp_path / "norm=layernorm,seed=0 it's")


def test_metrics_that_were_lost_are_missed(stop: Stop, go_on: Callable[[Path], None]) -> None:
    folder = stop("training_step", 1, "trainer.max_steps=3", "trainer.limit_train_batches=3")
    assert folder is not None
    (folder / "metrics.csv").unlink()
    with pytest.raises(ConfigError, match=r"metrics\.csv has 0 rows, and 1 had been written when 00000001-"):
        go_on(folder)


@pytest.mark.slow
def test_the_command_line_goes_on_and_refuses_another_run(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("trainer=smoke", "logger=csv", "optimizer.lr=0.05")
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))  # as if it had been killed

    other = command(f"resume={run}", "optimizer.lr=0.1", "norm=groupnorm", "logger=wandb")
    assert other.returncode == 2
    assert f"error: resume={run}: it would become another run:\n  norm._target_: ablab.norms.BatchNorm" in other.stderr
    assert "\n  optimizer.lr: 0.05 in the run, 0.1 now\n" in other.stderr
    assert "\n  logger" not in other.stderr, "it changes no result"
    assert "leave the change out, or begin a new run with it" in other.stderr
    assert json.loads((run / "run.json").read_text()) == {**record, "status": "running"}

    again = command(f"resume={run}", "data.num_workers=1", "logger=wandb")
    assert again.returncode == 0, again.stderr
    after = json.loads((run / "run.json").read_text())
    assert after["metrics"] == record["metrics"]
    assert after["weights_sha256"] == record["weights_sha256"]
    assert after["resumed"][0]["overrides"] == [f"resume={run}", "data.num_workers=1", "logger=wandb"]

    finished = command(f"resume={run}")
    assert finished.returncode == 0
    assert "this run has finished" in finished.stdout


def test_a_configs_difference_is_that_of_values_which_can_change_the_result(config: Callable[..., DictConfig]) -> None:
    from ablab.lab.run.identity import identity, result_differences

    def plain(*words: str) -> Any:
        return OmegaConf.to_container(config(*words), resolve=True)

    old = plain("seed=0")
    same = plain("name=x", "output_dir=elsewhere", "logger=csv", "data.num_workers=3", "callbacks.samples=null")
    assert result_differences(old, same) == []
    assert identity(old, code="c", data="d") == identity(same, code="c", data="d")
    assert result_differences(old, plain("optimizer.lr=0.2")) == [("optimizer.lr", 0.1, 0.2)]
    assert result_differences(old, plain("~callbacks.nonfinite"))[0] == (
        "callbacks.nonfinite._target_",
        "ablab.callbacks.nonfinite.NonFinite",
        "(none)",
    )
    hashes = [identity(old, code=c, data=d)["run"] for c, d in (("c", "d"), ("x", "d"), ("c", "x"))]
    assert len(set(hashes)) == 3
    assert identity(plain("seed=1"), code="c", data="d")["run"] not in hashes
    assert identity(old, code="c", data="d", processes=2)["run"] not in hashes, "the config may leave them to a machine"


def test_another_environment_is_said_and_the_threads_are_those_of_the_run(
    run: Start, go_on: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run()
    file = done.folder / "environment.json"
    then = json.loads(file.read_text())
    now = torch.get_num_threads()
    other = {"threads": {**then["threads"], "torch": now + 1}, "packages": {**then["packages"], "torch": "1.0"}}
    file.write_text(json.dumps({**then, **other}))
    try:
        go_on(done.folder)
        assert torch.get_num_threads() == now + 1
    finally:
        torch.set_num_threads(now)
    printed = capsys.readouterr().err
    assert "warning: what follows may differ from what an uninterrupted run finds; not as it was:" in printed
    assert f"\n  torch: 1.0 then, {torch.__version__.split('+')[0]}" in printed
    assert "threads" not in printed


def test_trust_reaches_hydra_beside_resume() -> None:
    words = ["train.py", "resume=runs/x", "trust=true", "data.num_workers=2"]
    assert hydra_argv(words) == ["train.py", "resume=runs/x", "trust=true"]


def test_a_record_without_its_batch_sizes_is_refused(run: Start) -> None:
    folder = run().folder
    about = json.loads((folder / "run.json").read_text())
    del about["batch_sizes"]
    (folder / "run.json").write_text(json.dumps({**about, "status": "stopped"}))
    cfg = read_config(folder)
    cfg.resume = str(folder)
    with pytest.raises(ConfigError, match=r"its run.json is not what a run writes .it lacks batch_sizes."):
        train(cfg)
