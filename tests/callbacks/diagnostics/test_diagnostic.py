"""The rule of all measures: with them or without, stopped or not, a run is the same to the bit."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ablab.callbacks.diagnostics.diagnostic import TaskCopy, sees_batch, weight_layers
from ablab.data.batch import Batch
from ablab.lab.run.resume import resume_config

Start = Callable[..., SimpleNamespace]

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "measures.md").read_text()
THERE = sorted(file.stem for file in (ROOT / "conf" / "callbacks" / "measure").glob("*.yaml"))
NAMES = [name for name in THERE if f"| `{name}` |" in PAGE]
OWN = [name for name in THERE if name not in NAMES]  # that somebody has added: the rule is for them, too
TITLES = {"gradient", "drift", "covariate_shift", "landscape", "weights", "norms", "sharpness"}
ON_SAMPLES = [name for name in NAMES if name not in ("covariate_shift", "weights")]
ALL = [
    f"+callbacks/measure=[{','.join(NAMES)}]",
    *(f"callbacks.{name}.every_n_steps=2" for name in NAMES),
    *(f"callbacks.{name}.num_samples=32" for name in ON_SAMPLES),
    *("callbacks.gradient_noise.num_groups=4", "callbacks.sharpness.max_iterations=3", "callbacks.drift.num_values=64"),
    "callbacks.landscape.multiples=[1, 2]",
]
FEW = ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=2"]
STEPS = ["trainer=cpu", "trainer.max_epochs=-1", "trainer.max_steps=5", "trainer.val_check_interval=3", *FEW]
STEPS += ["trainer.check_val_every_n_epoch=null", "data.batch_size=8"]
RUNS = {
    "resnet": [
        *("data/augment=crop_flip", "data.augment.mixup=0.3", "data.micro_batch_size=4", "callbacks=ema"),
        "model.width=8",
    ],
    "transformer": [
        *("model=transformer", "data=japanese_vowels", "model.dropout=0.2", "norm=batchnorm", "model.num_layers=1"),
        "model.embed_dim=16",
    ],
    "rnn": ["model=rnn", "data=text", "data.context_length=8", "model.hidden_size=16", "model.num_layers=2"],
    "spectral": ["norm=spectralnorm", "trainer.max_steps=2", "model.width=8"],
    "weight_norm": ["model=transformer", "norm=weightnorm", "model.num_layers=1", "trainer.max_steps=2"],
    "renorm": [
        *("norm=batchrenorm", "norm.renorm_start=0", "norm.renorm_end=2", "trainer.max_steps=2"),
        "model.width=8",
    ],
}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def measured(row: dict[str, str]) -> bool:
    return any(value and name.split("/")[0] in TITLES for name, value in row.items())


def others(folder: Path) -> list[dict[str, str]]:
    """The rows of what is not measured."""
    return [{name: value for name, value in row.items() if value} for row in rows(folder) if not measured(row)]


@pytest.mark.parametrize("name", RUNS)
def test_with_all_measures_a_run_is_the_same_to_the_bit(run: Start, name: str) -> None:
    own = {word.partition("=")[0] for word in RUNS[name]}
    words = [*(word for word in STEPS if word.partition("=")[0] not in own), *RUNS[name]]
    on, off = run(*words, *ALL), run(*words)
    records = [json.loads((done.folder / "run.json").read_text()) for done in (on, off)]
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert others(on.folder) == others(off.folder)
    found = [row for row in rows(on.folder) if measured(row)]
    assert {column.split("/")[0] for row in found for column, value in row.items() if value} >= TITLES
    steps = {"0", "2"} if "trainer.max_steps=2" in words else {"0", "2", "4", "5"}
    assert {row["step"] for row in found} == steps
    assert not any(measured(row) for row in rows(off.folder))


@pytest.mark.parametrize("name", OWN or ["weights"])
def test_with_a_measure_of_ones_own_a_run_is_the_same_to_the_bit(run: Start, name: str) -> None:
    on, off = run(*STEPS, *RUNS["resnet"], f"+callbacks/measure={name}"), run(*STEPS, *RUNS["resnet"])
    records = [json.loads((done.folder / "run.json").read_text()) for done in (on, off)]
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]
    assert records[0]["metrics"] == records[1]["metrics"]


def test_the_page_names_measures_that_there_are() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(NAMES)
    assert len(NAMES) >= 7


def result(folder: Path) -> Any:
    record = json.loads((folder / "run.json").read_text())
    return (record["status"], record["metrics"], record["weights_sha256"], (folder / "metrics.csv").read_text())


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("rnn", [("training_step", 5), ("validation_step", 1)]),
        pytest.param("rnn", [("training_step", 2)], marks=pytest.mark.thorough),
        pytest.param("resnet", [("training_step", 4)], marks=pytest.mark.thorough),
        pytest.param("transformer", [("training_step", 4)], marks=pytest.mark.thorough),
    ],
)
def test_a_stopped_run_with_all_measures_goes_on_to_the_same_bytes(
    run: Start, stop: Callable[..., Path | None], name: str, places: list[tuple[str, int]]
) -> None:
    from ablab.lab.train import train

    words = [*STEPS, *RUNS[name], *ALL]
    expected = result(run(*words).folder)
    for step, k in places:
        folder = stop(step, k, *words)
        assert folder is not None
        train(resume_config(OmegaConf.create({"resume": str(folder)})))
        assert result(folder) == expected, f"stopped in {step} number {k}"


def test_a_run_that_died_after_its_last_step_measures_it_once(run: Start) -> None:
    from ablab.lab.train import train

    done = run(*STEPS, *RUNS["rnn"], *ALL)
    expected = result(done.folder)
    record = json.loads((done.folder / "run.json").read_text())
    (done.folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    train(resume_config(OmegaConf.create({"resume": str(done.folder)})))
    assert result(done.folder) == expected


@pytest.mark.slow
def test_two_processes_measure_and_stay_what_they_are(command: Callable[..., Any], tmp_path: Path) -> None:
    words = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=csv", "norm=syncbatchnorm"]
    words += ["model.width=8", *(word for word in STEPS if word != "trainer=cpu")]
    found = []
    for more in (ALL, []):
        place = tmp_path / f"runs{len(more)}"
        result = command(*words, *more, f"output_dir={place}")
        assert result.returncode == 0, result.stderr
        found += place.iterdir()
    records = [json.loads((folder / "run.json").read_text()) for folder in found]
    assert records[0]["weights_sha256"] == records[1]["weights_sha256"]
    assert others(found[0]) == others(found[1])
    values = [row["norms/values/norm1"] for row in rows(found[0]) if row["norms/values/norm1"]]
    assert values == ["512.0"] * 4, "8 samples of 64 pixels, over both processes"
    assert len([row for row in rows(found[0]) if row["sharpness/eigenvalue"]]) == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_measure_has_an_entry_of_its_name_and_says_what_it_logs(
    config: Callable[..., DictConfig], name: str
) -> None:
    from hydra.utils import get_class

    node = config(f"+callbacks/measure={name}").callbacks[name]
    assert node._target_.startswith("ablab.callbacks.diagnostics.")
    documentation = get_class(node._target_).__doc__
    assert documentation is not None
    assert "\n    Logs `" in documentation
    assert "https://" in documentation
    assert "\n    Args:\n" in documentation


def test_off_nothing_of_a_measure_is_loaded(config: Callable[..., DictConfig]) -> None:
    assert "measures" not in str(OmegaConf.to_container(config()))
    code = (
        "import sys; from ablab.lab.config.build import build; from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(ROOT / 'conf')!r}, version_base='1.3'): cfg = compose('train')\n"
        "import ablab.lab.train\n"
        "callbacks = [build(node) for node in cfg.callbacks.values()]\n"
        "print([name for name in sys.modules if 'measures' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        *((name, "every_n_steps=0", r"every_n_steps=0: at least 1 is needed") for name in NAMES),
        *((name, "num_samples=0", r"num_samples=0: at least 1 is needed") for name in ON_SAMPLES),
        ("gradient_noise", "num_groups=1", r"num_groups=1: at least 2 is needed"),
        ("gradient_noise", "num_groups=300", r"num_groups=300: there are 256 samples for them; choose fewer groups"),
        ("drift", "num_values=1", r"num_values=1: at least 2 is needed"),
        ("sharpness", "max_iterations=0", r"max_iterations=0: at least 1 is needed"),
        ("sharpness", "tolerance=0", r"tolerance=0: a share of the eigenvalue; choose one above 0 and below 1"),
        ("landscape", "multiples=[1, -1]", r"multiples=\[1, -1\]: steps have sizes above 0; give at least one"),
        ("landscape", "multiples=[]", r"multiples=\[\]: steps have sizes above 0; give at least one"),
        ("landscape", "multiples=null", r"multiples=None, step_sizes=None: one of the two says how far to go; set the"),
        ("landscape", "step_sizes=[1]", r"multiples=\[.*\], step_sizes=\[1\]: one of the two says how far to go"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_their_place(
    config: Callable[..., DictConfig], name: str, setting: str, message: str
) -> None:
    from ablab.errors import ConfigError
    from ablab.lab.config.build import build

    cfg = config(f"+callbacks/measure={name}", f"callbacks.{name}.{setting}")
    with pytest.raises(ConfigError, match=rf"^callbacks\.{name}\.{message}"):
        build(cfg.callbacks[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["drift", "num_samples=2000"],
            r"num_samples=2000: ActivationDrift can be .* the 1149 training .* at most 1149",
        ),
        (
            ["sharpness", "num_samples=16"],
            r"num_samples=16: the model's norm sees the 32 samples .* a multiple of 32, for",
        ),
        (["gradient_noise", "num_samples=40"], r"num_samples=40: the model's norm sees 32 samples .* at least 64, or"),
    ],
)
def test_samples_that_there_are_not_are_refused_before_the_first_step(
    run: Start, words: list[str], message: str
) -> None:
    name, setting = words
    with pytest.raises(ValueError, match=f"^{message}"):
        run(f"+callbacks/measure={name}", f"callbacks.{name}.{setting}")


def test_a_stream_is_measured_at_its_beginning(run: Start, files: Path) -> None:
    words = ["data=hf_image", f"data.root={files}/images", "data.name=digits", "data.streaming=true"]
    words += [
        "data.val_split=validation",
        "data.shuffle_block=60",
        "data.batch_size=70",
        "callbacks.norms.num_samples=70",
    ]
    done = run(*words, "+callbacks/measure=[norms]")
    assert all(float(row["norms/logits_gap"]) > 0 for row in rows(done.folder) if measured(row))


# The copy ------------------------------------------------------------------------------------------------------------


class Leaky(nn.Module):
    """Draws, moves a buffer, and has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.linear(x))) + torch.rand(1) * self.norm.running_mean


def test_the_loss_of_a_copy_depends_on_weights_and_batch_alone(
    copy_task: Callable[[nn.Module], TaskCopy], samples: Callable[..., Batch]
) -> None:
    model, batch = Leaky(), samples(16)
    calls: list[int] = []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    copy = copy_task(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert copy.loss(batch) == copy.loss(batch)
    copy.gradient([batch])
    copy.add_to_weights(torch.ones(sum(p.numel() for p in copy.parameters)))
    assert calls == []
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sees_batch(model)
    assert [*weight_layers(model)] == ["linear"]


def test_the_gradient_of_batches_is_that_of_all_samples(
    copy_task: Callable[[nn.Module], TaskCopy], samples: Callable[..., Batch]
) -> None:
    from ablab.callbacks.diagnostics.diagnostic import split_batch

    copy, batch = copy_task(nn.Linear(3, 1)), samples(20)
    loss, gradient = copy.gradient(split_batch(batch, 8))
    whole = copy.gradient([batch])
    assert loss == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-12, atol=0)


def test_copies_leave_a_model_with_reparametrized_weights_alone(copy_task: Callable[[nn.Module], TaskCopy]) -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = copy_task(model)
    copy(Batch(torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 1)))
    assert all(torch.equal(value, before[name].double()) for name, value in model.state_dict().items())
    assert "original" in str([*copy.named])


# The page ------------------------------------------------------------------------------------------------------------

COMMANDS = [
    line.split("#")[0].strip()
    for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in code.splitlines()
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_on_measures_runs(line: str, run: Start) -> None:
    python, script, *words = shlex.split(line)
    assert (python, script) == ("python", "train.py")
    chosen = [name for name in ON_SAMPLES if re.search(rf"\b{name}\b", words[0])]
    done = run(*words, *(f"callbacks.{name}.num_samples=32" for name in chosen))
    assert any(measured(row) for row in rows(done.folder)) or chosen == ["drift"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_measures_names_every_measure_its_columns_and_its_interval(
    config: Callable[..., DictConfig], name: str
) -> None:
    from hydra.utils import get_class

    node = config(f"+callbacks/measure={name}").callbacks[name]
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | `"))
    assert f" | {node.every_n_steps} | " in row
    logged = (get_class(node._target_).__doc__ or "").partition("Logs ")[2].partition("Args:")[0]
    columns = set(re.findall(r"`([a-z_]+/[a-z_]+)[`/]", logged))
    assert columns == set(re.findall(r"`([a-z_]+/[a-z_]+)[`/]", row))
