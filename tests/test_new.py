"""What scripts/new.py writes works at once, as does all that docs/extending.md shows: in a copy of the project."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import forked
from tests.repository import committed
from torch import nn

from ablab.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
KINDS = ["norm", "model", "data", "task", "optimizer", "ablation"]
COPIED = ["conf", "src", "scripts", "tests", "docs", "train.py", "README.md", "Makefile", "pyproject.toml"]
# As scripts are started by tests, in a process that has the libraries: with the copy's package instead of this one.
STARTER = """
import runpy, sys
sys.path[:] = [{source!r}, *(path for path in sys.path if path != {ours!r})]
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0:0] = [str(__import__("pathlib").Path(script).parent)]
runpy.run_path(script, run_name="__main__")
"""

Start = Callable[..., subprocess.CompletedProcess[str]]


def copied(place: Path, *names: str) -> Path:
    """A copy of the project, or of some of what it consists of."""
    place.mkdir()
    for name in names or COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, place)
    (place / "starter.py").write_text(STARTER.format(source=str(place / "src"), ours=str(ROOT / "src")))
    return place


def starts(copy: Path) -> Start:
    """Starts one of the copy's scripts in the copy, as a user does."""

    def start(script: str, *words: str, folder: Path = copy) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        words = (str(copy / script), *words)
        return forked.run(copy / "starter.py", words, folder=folder, environment=environment, timeout=300)

    return start


@pytest.fixture
def new(tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """The script as a module, and the folder of the project that it writes to."""
    place = copied(tmp_path / "project", "conf", "src", "scripts")
    spec = importlib.util.spec_from_file_location("new", place / "scripts" / "new.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new"] = module
    spec.loader.exec_module(module)
    yield module, place
    del sys.modules["new"]


def there(place: Path) -> set[Path]:
    return {path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


# The script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_writes_the_files_and_nothing_else(new: tuple[Any, Path], kind: str) -> None:
    script, place = new
    before = {path: path.read_bytes() for path in there(place)}
    written = script.create_files(kind, "my_own_2")
    assert there(place) - set(before) == set(written)
    assert len(written) == (1 if kind == "ablation" else 2)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert written[-1] == place / "conf" / kind / "my_own_2.yaml"
    assert not re.search("template", "".join(path.read_text() for path in written), re.IGNORECASE)
    if kind != "ablation":
        assert "\nclass MyOwn2" in written[0].read_text()


@pytest.mark.parametrize("name", ["q", "a_name_of_forty_letters_that_is_at_limit"])
def test_whatever_the_name_the_linters_have_nothing_to_say(new: tuple[Any, Path], name: str) -> None:
    script, place = new
    written = [str(path) for kind in KINDS for path in script.create_files(kind, name) if path.suffix == ".py"]
    shutil.copy(ROOT / "pyproject.toml", place)
    for words in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *words, *written], cwd=place, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout


REFUSED = [
    ("norm", "MyNorm", "MyNorm: small letters, digits and single _ are needed, a letter first; choose my_norm"),
    ("norm", "my-norm", "my-norm: small letters, digits and single _ are needed, a letter first; choose my_norm"),
    ("norm", "_base", "_base: small letters, digits and single _ are needed, a letter first; choose base"),
    (
        "norm",
        "3",
        "3: small letters, digits and single _ are needed, a letter first; choose another, my_idea for example",
    ),
    ("norm", "a" * 41, f"{'a' * 41}: it has 41 letters; choose a name of at most 40"),
    ("norm", "class", "class: the word means something else to Python, Hydra or YAML; choose class_norm, say"),
    ("ablation", "null", "null: the word means something else to Python, Hydra or YAML; choose null_ablation, say"),
    ("norm", "batch", "batch: there is src/ablab/norms/batch.py already; choose another name, or change that file"),
    (
        "norm",
        "groupnorm",
        "groupnorm: there is conf/norm/groupnorm.yaml already; choose another name, or change that file",
    ),
    ("model", "qk_norm", "qk_norm: there is conf/model/qk_norm already; choose another name, or change that file"),
    (
        "ablation",
        "norm_batch_size",
        "norm_batch_size: there is conf/ablation/norm_batch_size.yaml already; choose another name, or change that "
        "file",
    ),
    ("data", "json", "json: a module that can be imported has this name; choose json_data, say"),
    ("model", "torch", "torch: a module that can be imported has this name; choose torch_model, say"),
    (
        "norm",
        "recalibrate",
        "recalibrate: src/ablab/norms has something else of this name; choose recalibrate_norm, say",
    ),
    ("norm", "tensor", "tensor: its class would be Tensor, which is another one's name; choose tensor_norm, say"),
    ("data", "value_error", "value_error: its class would be ValueError, which is another one's name; choose value_"),
    (
        "modle",
        "mine",
        "modle: it is nothing that can be begun; did you mean model? new.py has: ablation, data, model, ",
    ),
]


@pytest.mark.parametrize(("kind", "name", "message"), REFUSED, ids=[f"{kind} {name}" for kind, name, _ in REFUSED])
def test_a_name_that_cannot_be_taken_is_refused_and_nothing_is_written(
    new: tuple[Any, Path], kind: str, name: str, message: str
) -> None:
    script, place = new
    before = there(place)
    with pytest.raises(ConfigError) as refused:
        script.create_files(kind, name)
    assert str(refused.value).startswith(message)
    assert there(place) == before


def test_what_cannot_be_written_whole_is_not_written_at_all(
    new: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, place = new
    before = there(place)
    original = Path.open

    def full(self: Path, *arguments: Any, **settings: Any) -> Any:
        if self.suffix == ".yaml" and "x" in arguments:
            raise OSError("no space left on device")
        return original(self, *arguments, **settings)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="no space left"):
        script.create_files("norm", "my_norm")
    assert there(place) == before


def test_it_is_started_from_anywhere_and_says_what_to_do_next(tmp_path: Path) -> None:
    copy = copied(tmp_path / "project")
    start = starts(copy)
    result = start("scripts/new.py", "norm", "my_norm", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "wrote src/ablab/norms/my_norm.py",
        "wrote conf/norm/my_norm.yaml",
        f"try it:   cd {copy} && python train.py norm=my_norm",
        f"test it:  cd {copy} && python -m pytest tests/norms tests/models tests/optim tests/test_train.py -k my_norm",
        "make it yours: docs/extending.md",
    ]
    assert "try it:   python train.py model=my_model\n" in start("scripts/new.py", "model", "my_model").stdout
    help = start("scripts/new.py", "--help").stdout
    assert all(f"python scripts/new.py {kind} my_{kind}" in help for kind in KINDS)
    for words in ([], ["norm"], ["norm", "a", "b"]):
        result = start("scripts/new.py", *words)
        assert result.returncode == 2
        assert result.stderr.startswith(
            "error: a kind (norm, model, data, task, optimizer, ablation) and a name are needed: "
        )


def test_the_optimizer_that_is_written_takes_torchs_steps(new: tuple[Any, Path]) -> None:
    script, _ = new
    names: dict[str, Any] = {"__name__": "mine"}
    exec(compile(script.create_files("optimizer", "my_own")[0].read_text(), "mine", "exec"), names)
    nets = []
    for make in (names["MyOwn"], torch.optim.SGD):
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        optimizer = make(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


# The page, and what it begins -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which everything on the page has been done but training and testing."""
    copy = copied(tmp_path_factory.mktemp("fork") / "project")
    start = starts(copy)
    for language, code in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL):
        first, _, rest = code.partition("\n")
        if language == "diff":
            subprocess.run(["git", "apply", "-"], cwd=copy, input=code, text=True, check=True)
        elif language in ("python", "yaml") and re.fullmatch(r"# (src|conf)/\S+", first):
            (copy / first.removeprefix("# ")).write_text(rest)
        for line in code.splitlines() if language == "bash" else ():
            _, script, *words = shlex.split(line)
            if script == "scripts/new.py":
                assert start(script, *words).returncode == 0
    committed(copy)  # a run warns where no commit can be recorded
    return copy


COMMANDS = [line for code in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in code.splitlines()]
TRAINING = [line for line in COMMANDS if line.startswith("python train.py ")]
FEW = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.log_every_n_steps=1"]
FEW += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]


@pytest.mark.parametrize("line", TRAINING)
def test_every_training_on_the_page_runs(fork: Path, tmp_path: Path, line: str) -> None:
    _, script, *words = shlex.split(line)
    alone = [] if "logger=" in line or "ablation=" in line else ["logger=csv"]
    seed = ["seed=0"] if "ablation=" in line else []
    words = [word for word in words if not word.startswith("seed=")]
    result = starts(fork)(script, *words, *alone, *seed, *FEW, f"output_dir={tmp_path}/runs")
    assert (result.returncode, result.stderr) == (0, "")


def test_the_page_tests_what_is_begun_as_the_script_says(new: tuple[Any, Path]) -> None:
    script, _ = new
    testing = [line for line in COMMANDS if line.startswith("python -m pytest ")]
    assert testing == [f"python -m pytest {kind.tests} -k my_{name}" for name, kind in script.KINDS.items()]
    assert all((ROOT / folder).exists() for kind in script.KINDS.values() for folder in kind.tests.split())
    others = {*COMMANDS} - {*testing, *TRAINING, *(f"python scripts/new.py {name} my_{name}" for name in script.KINDS)}
    assert others == {"python scripts/norms_table.py"}


def test_a_norm_that_was_begun_has_a_row_in_the_table_of_norms(fork: Path) -> None:
    result = starts(fork)("scripts/norms_table.py")
    [row] = [line for line in result.stdout.splitlines() if line.startswith("| `my_norm` |")]
    assert row.split(" | ")[1] == "mean and power mean over all features"


def test_the_python_of_the_page_runs(fork: Path) -> None:
    code = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if not code.startswith("# src/")]
    (fork / "page.py").write_text("\n".join(code))
    result = starts(fork)("page.py")
    assert (result.returncode, result.stderr) == (0, "")


def pytest_in(fork: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (fork / "run_pytest.py").write_text(forked.PYTEST)
    return starts(fork)("run_pytest.py", "-p", "no:cacheprovider", "-p", "no:xdist", *words)


@pytest.mark.slow
def test_what_was_begun_passes_the_tests_that_go_through_it(fork: Path) -> None:
    places = ["norms/test_declarations.py", "norms/test_layers.py", "data/test_datamodule.py", "data/test_reading.py"]
    places += [
        "tasks/test_every_task.py",
        "optim/test_optim.py",
        "models/test_grid.py",
        "ablation/test_ablation.py",
        "test_train.py",
    ]
    begun = " or ".join(f"my_{kind}" for kind in [*KINDS, "schedule", "callback", "measure", "experiment", "logger"])
    slow = "compiles or resnet50 or recurrent_cell or workers_do or overfits_one_batch or bfloat16 or same_seed"
    words = ("-m", "not thorough", "-k", f"({begun}) and not ({slow})")
    result = pytest_in(fork, *(f"tests/{place}" for place in places), *words)
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 60


@pytest.mark.slow
def test_what_was_begun_turns_no_test_red_that_is_about_ours(fork: Path) -> None:
    about = "named or names_data or table or claim or signature or imports_only"
    places = ["test_readme.py", "test_docs.py", "test_imports.py", "config"]
    result = pytest_in(fork, *(f"tests/{place}" for place in places), "-k", about)
    assert result.returncode == 0, result.stdout
