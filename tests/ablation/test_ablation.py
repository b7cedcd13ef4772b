"""The grid as data: what it makes of factors, levels and seeds, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import DictConfig

from ablab.errors import ConfigError
from ablab.lab.ablation.ablation import Ablation
from ablab.lab.ablation.overrides import parse_ablation
from ablab.lab.config.schema import quote_value

GRID: dict[str, Any] = {
    "name": "small",
    "factors": {
        "norm": ["batchnorm", "none"],
        "data.batch_size": {2: ["data.batch_size=2", "optimizer.lr=0.1"], 4: []},
    },
    "seeds": [0, 1],
    "baseline": {"norm": "batchnorm"},
}


def test_every_level_meets_every_other_with_every_seed() -> None:
    runs = list(Ablation(**GRID).runs())
    assert [run.label for run in runs[:2]] == [
        "norm=batchnorm data.batch_size=2 seed=0",
        "norm=batchnorm data.batch_size=4 seed=0",
    ]
    assert runs[0].overrides == ("norm=batchnorm", "data.batch_size=2", "optimizer.lr=0.1")
    assert len({run.label for run in runs}) == len(runs) == 8


def test_what_is_excluded_is_not_run() -> None:
    grid = Ablation(**GRID, exclude=[{"norm": "batchnorm", "data.batch_size": 2}])
    assert len(grid.cells()) == 3
    assert not [run for run in grid.runs() if run.label.startswith("norm=batchnorm data.batch_size=2")]


def test_a_tuned_key_is_tried_in_every_cell() -> None:
    grid = Ablation(**GRID, tune={"key": "optimizer.lr", "values": [1.0, 0.1, 0.01], "seeds": [7]})
    tried = list(grid.tuning_runs())
    assert [value for _, value in tried[:3]] == [0.01, 0.1, 1.0]
    assert len(tried) == 4 * 3
    assert tried[0][0].overrides[-1] == "optimizer.lr=0.01"
    assert tried[0][0].seed == 7


WRONG = [
    (
        {"baseline": {"norm": "groupnorm"}},
        "ablation.baseline.norm=groupnorm: it is no level; norm has: batchnorm, none",
    ),
    ({"baseline": {"nrm": "none"}}, "ablation.baseline.nrm: there is no such factor; did you mean norm?"),
    ({"exclude": [{"data.batch_size": 8}]}, "ablation.exclude.data.batch_size=8: it is no level"),
    ({"seeds": []}, "ablation.seeds=[]: at least one seed is needed, and each once"),
    ({"seeds": [1, 1]}, "ablation.seeds=[1, 1]: at least one seed is needed, and each once"),
    ({"factors": {"norm": []}, "baseline": None}, "ablation.factors.norm: it has no levels; give some"),
    ({"factors": {"norm": "none"}, "baseline": None}, "ablation.factors.norm=none: a list of values is needed"),
    ({"factors": {"norm": ["none", "none"]}, "baseline": None}, "ablation.factors.norm=[.*]: a level is there twice"),
    ({"tune": {"key": "norm", "values": [1, 2]}}, "ablation.tune.key=norm: it is a factor, too; leave one of the two"),
    ({"tune": {"key": "optimizer.lr", "values": [0.1]}}, "ablation.tune.values=[0.1]: at least 2 values are needed"),
    ({"seeds": list(range(1000))}, "ablation: 4,000 runs (2 of norm × 2 of data.batch_size × 1000 seeds); if they are"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_grid_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Ablation(**{**GRID, **change})
    assert str(refused.value).startswith(message.replace("[.*]", "['none', 'none']"))


def test_a_large_grid_can_be_meant() -> None:
    assert Ablation(**{**GRID, "seeds": list(range(1000)), "max_runs": 4000}).cells()


def test_a_million_cells_are_counted_without_making_them() -> None:
    with pytest.raises(ConfigError, match="1,000,000 runs"):
        Ablation(name="many", factors={name: list(range(10)) for name in "abcdef"}, seeds=[0])


def test_the_runs_of_a_grid_are_those_that_take_place() -> None:
    tune = {"key": "optimizer.lr", "values": [1.0, 0.1, 0.01], "seeds": [1, 7]}
    exclude = [{"norm": "none", "data.batch_size": 4}]
    for grid in (Ablation(**GRID), Ablation(**GRID, tune=tune), Ablation(**GRID, tune=tune, exclude=exclude)):
        chosen = [grid.with_tuned_value(run, 0.1) if grid.tune else run for run in grid.runs()]
        assert grid.num_runs() == len({run.label for run in [*chosen, *(run for run, _ in grid.tuning_runs())]})
    with pytest.raises(
        ConfigError, match=r"21 runs \(2 of norm × .* × \(3 of optimizer.lr × 2 seeds \+ 1 seeds more\), "
    ):
        Ablation(**GRID, tune=tune, exclude=exclude, max_runs=20)
    assert Ablation(**GRID, tune=tune, exclude=exclude, max_runs=21)


def test_values_are_typed_so_that_hydra_reads_them_again(config: Callable[..., DictConfig]) -> None:
    for value in ("a b", "it's", "x,y", [1, 0.5], True, None, "last(train/loss)"):
        assert config(f"cell={{value:{quote_value(value)}}}").cell.value == value


def test_words_narrow_and_widen_an_ablation(config: Callable[..., DictConfig]) -> None:
    words = [
        "ablation=norm_batch_size",
        "norm=batchnorm,frn,none",
        "data.batch_size=4,8",
        "seed=range(7)",
        "trainer=gpu",
    ]
    ablation, common = parse_ablation(words, config("ablation=norm_batch_size"))
    assert ablation.factors == {"norm": ["batchnorm", "frn", "none"], "data.batch_size": ["4", "8"]}
    assert ablation.seeds == list(range(7))
    assert ablation.cell_overrides({"norm": "frn", "data.batch_size": "4"}) == [
        "norm=frn",
        "data.batch_size=4",
        "optimizer.lr=0.0125",
    ]
    assert common == ["ablation=norm_batch_size", "trainer=gpu"]


def test_another_word_with_several_values_is_one_factor_more(config: Callable[..., DictConfig]) -> None:
    ablation, _ = parse_ablation(["norm=batchnorm", "model.depth=8,14"], config("ablation=norm_batch_size"))
    assert ablation.factors["norm"] == ["batchnorm"]
    assert ablation.factors["model.depth"] == ["8", "14"]


def test_words_alone_make_a_grid_whose_baseline_is_the_first_level(config: Callable[..., DictConfig]) -> None:
    ablation, common = parse_ablation(["norm=none,batchnorm", "optimizer.lr=0.1", "seed=3"], config("seed=3"))
    assert ablation.name.startswith("sweep_norm_")
    assert (ablation.baseline, ablation.seeds, ablation.metrics) == ({"norm": "none"}, [3], ["test/accuracy"])
    assert common == ["optimizer.lr=0.1", "seed=3"]


TUNED = "+ablation.tune={key:optimizer.lr,values:[0.1,1.0]}"
UNDONE = [
    (["optimizer.lr=0.777"], "optimizer.lr=0.777: data.batch_size=2,4,8,32 set optimizer.lr, too; leave"),
    (["optimizer.lr=0.1,0.2"], "optimizer.lr=0.1,0.2: data.batch_size=2,4,8,32 set optimizer.lr, too; l"),
    (
        [TUNED, "optimizer.lr=0.777"],
        "optimizer.lr=0.777: optimizer.lr is what ablation.tune chooses for each cell; lea",
    ),
    ([TUNED, "optimizer.lr=0.1,0.2"], "ablation.tune.key=optimizer.lr: it is a factor, too; leave one of the two out"),
    (["seed=a,b"], "seed=a,b: a seed is a whole number, seed=0,1,2 or seed=range(5)"),
    (["seed=0.5"], "seed=0.5: a seed is a whole number, seed=0,1,2 or seed=range(5)"),
    (
        ["resume=a,b"],
        "resume=a,b: each run of a sweep has its own folder, and the same command goes on with those that",
    ),
    (["folder=a"], "folder=a: each run of a sweep has its own folder, and the same command goes on with those that"),
]


@pytest.mark.parametrize(("words", "message"), UNDONE, ids=[" ".join(words) for words, _ in UNDONE])
def test_a_word_that_would_not_do_what_it_says_is_refused(
    config: Callable[..., DictConfig], words: list[str], message: str
) -> None:
    cfg = config("ablation=norm_batch_size", *(word for word in words if word == TUNED))
    with pytest.raises(ConfigError) as refused:
        parse_ablation(["ablation=norm_batch_size", *words], cfg)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.thorough)], ids=["levels", "cells"])
def test_every_ablation_is_a_grid_of_runs_that_compose(
    config: Callable[..., DictConfig], ablation_choice: str, every: bool
) -> None:
    """Each level of each factor in a cell at least, or every cell."""
    cfg = config(f"ablation={ablation_choice}")
    if ablation_choice == "none":
        assert cfg.ablation is None
        return
    ablation, common = parse_ablation([f"ablation={ablation_choice}"], cfg)
    assert ablation.name == ablation_choice, "two that have one name would have one folder"
    if ablation.claims:
        assert ablation.question.endswith("?")
        assert ablation.baseline
    composed: set[str] = set()
    for cell in ablation.cells():
        levels = {f"{name}={level}" for name, level in cell.items()}
        if every or levels - composed:
            config(*common, *ablation.cell_overrides(cell))
            composed |= levels


@pytest.mark.parametrize("scale", ["gpu", "imagenet"])
def test_an_ablation_of_images_has_the_size_of_papers_too(config: Callable[..., DictConfig], scale: str) -> None:
    small, large = (
        config("ablation=norm_batch_size"),
        config("ablation=norm_batch_size", f"scale={scale}", "data.root=x"),
    )
    assert (small.trainer.max_epochs, large.trainer.max_epochs) == (5, 100)
    assert large.model.depth > small.model.depth
    assert large.ablation == small.ablation


NAMES = [
    "../../x",
    "/tmp/x",
    "''",
    ".",
    "..",
    ".hidden",
    "dot.",
    "a/b",
    "'a\nb'",
    "' a'",
    "x" * 201,
    "'" + "\u00e4" * 101 + "'",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_folder_of_its_own_is_refused(config: Callable[..., DictConfig], name: str) -> None:
    with pytest.raises(ConfigError, match=r"name=.*it names a folder in output_dir, and is a word, not a path"):
        parse_ablation(["norm=none,batchnorm", f"name={name}"], config(f"name={name}"))
    with pytest.raises(ConfigError, match=r"ablation\.name=.*it names a folder in output_dir"):
        Ablation(**{**GRID, "name": name.strip("'")})


@pytest.mark.parametrize("word", ["name=a,b", "output_dir=a,b"])
def test_the_folder_of_a_sweep_is_no_factor(config: Callable[..., DictConfig], word: str) -> None:
    with pytest.raises(ConfigError, match=f"{word}: all runs of a sweep are in one folder; give one value"):
        parse_ablation([word], config())


def test_a_name_beside_an_ablation_with_a_file_is_refused(config: Callable[..., DictConfig]) -> None:
    with pytest.raises(ConfigError, match=r"name=mine: an ablation's file names its folder; give ablation.name=mine"):
        parse_ablation(["ablation=norm_batch_size", "name=mine"], config("ablation=norm_batch_size", "name=mine"))


def test_sweeps_of_one_factor_that_find_different_things_have_different_names(
    config: Callable[..., DictConfig],
) -> None:
    def name(*words: str) -> str:
        return parse_ablation(["norm=none,batchnorm", *words], config())[0].name

    assert name() == name("seed=3") == name("logger=csv", "quiet=true", "data.num_workers=2") == "sweep_norm"
    others = [name("model=rnn"), name("model=transformer"), name("optimizer.lr=0.3"), name("~scheduler")]
    assert len({*others, "sweep_norm"}) == 5
    assert name("model=rnn", "optimizer.lr=0.3") == name("optimizer.lr=0.3", "model=rnn")
    assert name("+callbacks.x.y=1") == name("++callbacks.x.y=1")


def test_a_sweep_of_very_many_factors_has_a_name_that_fits(config: Callable[..., DictConfig]) -> None:
    words = [f"+callbacks.x.{'long' * 12}{i}=1,2" for i in range(6)]
    name = parse_ablation(words, config())[0].name
    assert len(name) < 200
    assert name.startswith("sweep_6_factors_")


def test_an_ablation_without_a_cell_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ablation\.exclude: it leaves no cell to run"):
        Ablation(name="none", factors={"norm": ["none"]}, seeds=[0], exclude=[{"norm": "none"}])
