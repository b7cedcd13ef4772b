"""The folder of a run: different cells never share one, and what changes a result changes it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, open_dict

from ablab.errors import ConfigError
from ablab.lab.ablation.ablation import Ablation, PlannedRun
from ablab.lab.ablation.grid import Grid, PreparedRun, check_distinct_folders, folder_name
from ablab.lab.ablation.overrides import parse_ablation
from ablab.lab.launch import slurm
from ablab.lab.run.code import cache_hashes

ROOT = Path(__file__).parents[2]
Grids = Callable[..., Grid]


@cache
def composed(words: tuple[str, ...]) -> DictConfig:
    """The config of some words, which nobody changes."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", list(words), return_hydra_config=True)


@pytest.fixture
def grid(tmp_path: Path) -> Grids:
    """The grid that a command asks for, with its folder in tmp_path."""

    def make(*words: str) -> Grid:
        cfg = composed(tuple(word for word in words if "," not in word and "range(" not in word)).copy()
        with open_dict(cfg):
            del cfg["hydra"]
        ablation, common = parse_ablation(list(words), cfg)
        return Grid(ablation, common, lambda words: composed(tuple(words)), tmp_path)

    return make


def prepared(grid: Grid) -> list[PreparedRun]:
    return [grid.prepare(plan) for plan in grid.ablation.runs()]


def folders(grid: Grid) -> list[str]:
    return [run.folder.name for run in prepared(grid)]


TEXT = ("model=transformer", "data=text", "name=texts")
LONG = "/long" * 60


@pytest.mark.parametrize(
    "levels",
    [
        ["'/data/set 1'", "/data/set_1"],
        [f"{LONG}/english.txt", f"{LONG}/french.txt"],
        ["/data/A.txt", "/data/a.txt"],
        ["'/data/a\u0308.txt'", "'/data/\u00e4.txt'"],
        ["'/data/a.'", "/data/a", "'/data/a '"],
        ["'/data/a\nb'", "'/data/a b'"],
    ],
    ids=["signs", "long", "case", "accents", "ends", "lines"],
)
def test_cells_whose_data_alone_differ_have_folders_of_their_own(grid: Grids, levels: list[str]) -> None:
    names = folders(grid(*TEXT, f"data.path={','.join(levels)}"))
    assert len({name.casefold() for name in names}) == len(levels)
    for name in names:
        assert len(name.encode()) < 200
        assert name.isprintable()
        assert " " not in name


def test_a_name_of_wide_letters_is_short_enough_for_a_file_system() -> None:
    level = "\U00020000" * 300  # four bytes each
    name = folder_name(PlannedRun({"norm": level}, 0, ()), "a" * 16)
    assert len(name.encode()) <= 160
    name.encode().decode()


def test_moving_the_data_of_a_whole_ablation_keeps_its_folders(grid: Grids) -> None:
    words = (*TEXT, "norm=layernorm,rmsnorm")
    assert folders(grid(*words, "data.path=/here")) == folders(grid(*words, "data.path=/there"))


def test_levels_with_names_have_folders_of_their_own_though_their_words_differ_in_the_place_alone(grid: Grids) -> None:
    languages = {"factors": {"language": {"a b": ["data.path=/a"], "a_b": ["data.path=/b"]}}}
    made = grid(*TEXT)
    made.ablation = Ablation(name="languages", seeds=[0], **languages)
    assert len(set(folders(made))) == 2


def test_two_runs_with_one_folder_are_refused(grid: Grids, tmp_path: Path) -> None:
    one, other = prepared(grid("norm=none,batchnorm"))
    same = PreparedRun(other.plan, other.cfg, other.hydra, one.folder, [])
    with pytest.raises(ConfigError, match="norm=none seed=0 and norm=batchnorm seed=0 have the same folder"):
        check_distinct_folders([one, same])


def test_mixing_code_takes_a_run_of_the_same_cell(grid: Grids, tmp_path: Path) -> None:
    made = grid(*TEXT, "data.path=/a,/b")
    for run in prepared(made):
        old = run.folder.with_name(f"old{run.plan.cell['data.path'][1:]}")
        old.mkdir(parents=True)
        keys = ("model", "norm", "data", "task", "optimizer", "trainer", "callbacks", "logger")
        config = {**{key: {} for key in keys}, "seed": 0, "cell": run.plan.cell}
        (old / "config.yaml").write_text(json.dumps(config))
        identity = {"config": "same", "code": "old", "data": "", "run": ""}
        record = {"id": "x", "status": "finished", "overrides": [], "identity": identity, "processes": 1}
        (old / "run.json").write_text(
            json.dumps({**record, "batch_sizes": {"norm": 8}, "data": {"fingerprint": "f"}, "git_commit": None})
        )
    for place in ("/a", "/b"):
        assert made.find_same_config("same", {"data.path": place}) == made.folder / f"old{place[1:]}"
    assert made.find_same_config("same", {"data.path": "/c"}) is None
    assert made.find_same_config("other", {"data.path": "/a"}) is None


def test_an_edit_of_a_users_own_module_or_file_gives_new_folders(
    grid: Grids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_loss.py").write_text("import own_parts\n")
    (tmp_path / "own_parts.py").write_text("")
    (tmp_path / "weights.pt").write_bytes(b"old")
    monkeypatch.syspath_prepend(tmp_path)
    words = (
        "norm=none,batchnorm",
        "+callbacks.own._target_=own_loss.Own",
        f"+callbacks.own.file={tmp_path}/weights.pt",
    )

    def names() -> set[str]:
        with cache_hashes():
            return set(folders(grid(*words)))

    before = names()
    assert names() == before
    (tmp_path / "unrelated.py").write_text("new")
    assert names() == before
    (tmp_path / "own_parts.py").write_text("a = 1\n")
    edited = names()
    assert not edited & before
    (tmp_path / "weights.pt").write_bytes(b"new")
    assert not names() & (edited | before)
    (tmp_path / "weights.pt").write_bytes(b"old")
    assert names() == edited


# The folder of an ablation ------------------------------------------------------------------------------------------


def record(grid: Grid) -> Grid:
    """The grid, as if its first run had been done."""
    runs = prepared(grid)
    grid.write_record("python train.py", runs, None)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "run.json").write_text("{}")
    return grid


NORMS = ("norm=batchnorm,groupnorm", "seed=0,1", "name=mine")


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("model=rnn", *NORMS), "settings: none there, model=rnn now"),
        (("optimizer.lr=0.3", *NORMS), "settings: none there, optimizer.lr=0.3 now"),
        ((*NORMS, "model.depth=8,14"), "factors: norm there, model.depth, norm now"),
        (("model.depth=8,14", "name=mine"), "factors: norm there, model.depth now"),
    ],
)
def test_another_ablation_does_not_take_a_folder(grid: Grids, words: tuple[str, ...], difference: str) -> None:
    record(grid(*NORMS))
    with pytest.raises(ConfigError) as refused:
        grid(*words).check_folder()
    assert "mine: another ablation is there:" in str(refused.value)
    assert difference in str(refused.value)
    assert "give this one another name, name=…; nothing has been run" in str(refused.value)


@pytest.mark.parametrize(
    "words",
    [
        NORMS,
        ("norm=batchnorm,groupnorm,none", "seed=range(5)", "name=mine"),
        ("norm=batchnorm,none", "seed=7", "name=mine"),
        (*NORMS, "logger=csv", "quiet=true", "hydra.launcher.num_processes=2", "data.num_workers=1"),
    ],
)
def test_more_or_fewer_levels_and_seeds_are_the_same_ablation(grid: Grids, words: tuple[str, ...]) -> None:
    record(grid(*NORMS))
    grid(*words).check_folder()


def test_an_ablation_with_a_file_names_the_key_that_renames_it(grid: Grids) -> None:
    record(grid("ablation=norm_batch_size"))
    with pytest.raises(ConfigError, match=r"another name, ablation.name=…; nothing has been run"):
        grid("ablation=norm_batch_size", "trainer.max_epochs=1").check_folder()
    grid("ablation=norm_batch_size", "trainer.max_epochs=1", "ablation.name=longer").check_folder()


def test_a_folder_in_which_nothing_has_run_can_be_had(grid: Grids) -> None:
    first = grid(*NORMS)
    first.write_record("python train.py", prepared(first), None)
    grid("model=rnn", *NORMS).check_folder()


@pytest.mark.parametrize(("file", "what"), [("run.json", "a run is there"), ("study.db", "a search is there")])
def test_the_folder_of_something_else_is_refused(grid: Grids, tmp_path: Path, file: str, what: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / file).write_text("")
    with pytest.raises(ConfigError, match=what):
        grid(*NORMS).check_folder()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_an_unreadable_record_of_an_ablation_is_not_written_over(grid: Grids, content: str) -> None:
    made = record(grid(*NORMS))
    (made.folder / "ablation.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        made.check_folder()


def test_a_file_in_the_place_of_the_folder_is_refused(grid: Grids, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(ConfigError, match="mine: it is a file; give this one another name"):
        grid(*NORMS).check_folder()


def test_a_level_with_line_breaks_is_one_line_of_an_array_of_jobs(grid: Grids) -> None:
    for run in prepared(grid(*TEXT, "data.path='a\nb\tc\u2028d',x")):
        line = slurm.run_command(run, slurm.Site(python="printf '%s\\0'"), {})
        assert line.isprintable()
        done = subprocess.run(
            ["bash", "-c", 'eval "exec $command"'], env={"command": line}, capture_output=True, check=True
        )
        assert done.stdout.decode().split("\0")[2:-1] == list(run.overrides)
