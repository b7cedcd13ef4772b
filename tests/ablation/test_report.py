"""The report on results that are made up, whole or not: what it says, what it writes, what it refuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from ablab.errors import ConfigError
from ablab.lab.ablation.ablation import Ablation, PlannedRun
from ablab.lab.ablation.figures import Drawing, cell_label, figures, is_numeric, readable_name
from ablab.lab.ablation.progress import Progress
from ablab.lab.ablation.report import Report, compose_report, print_report, write_report
from ablab.lab.ablation.results import Results, read_results

NORMS = ["batchnorm", "groupnorm", "none"]
SIZES = [2, 8, 32]
BETTER = {"groupnorm": 0.05, "batchnorm": 0.0, "none": 0.0}


def results(*, seeds: int = 5, tune: bool = False, **changes: Any) -> Results:
    """An ablation in which group norm is better than the others by 0.05, and some runs are not what they should be."""
    rng = np.random.default_rng(0)
    settings: dict[str, Any] = {
        "name": "made_up",
        "question": "Is group norm better?",
        "factors": {"norm": NORMS, "data.batch_size": SIZES},
        "seeds": list(range(seeds)),
        "baseline": {"norm": "batchnorm"},
        "metrics": ["test/accuracy", "steps_until(val/loss <= 0.3)"],
        "tune": {"key": "optimizer.lr", "values": [0.01, 0.1, 1.0]} if tune else None,
    }
    ablation = Ablation(**{**settings, **changes})
    rows, curves = [], {}
    for seed in ablation.seeds:
        common = rng.normal(0, 0.05)
        for cell in ablation.cells():
            accuracy = 0.8 + BETTER[cell.get("norm", "batchnorm")] + common + rng.normal(0, 0.002)
            row = {**cell, "seed": seed, "status": "finished", "folder": f"{cell}{seed}", "error": ""}
            rows.append({**row, "test/accuracy": accuracy, "steps_until(val/loss <= 0.3)": 100.0 + seed})
            steps = np.arange(10, 60, 10)
            curves[f"{cell}{seed}"] = pd.DataFrame(
                {
                    "step": steps,
                    "epoch": 0,
                    "val/loss": np.exp(-steps / 30) * (1 + common),
                    "train/loss": np.exp(-steps / 20),
                }
            )
    found = Results(ablation, pd.DataFrame(rows), curves)
    if tune:
        tried = [(cell, value) for cell in ablation.cells() for value in (0.01, 0.1, 1.0)]
        scores = [{**cell, "value": value, "seed": 0, "status": "finished", "score": value} for cell, value in tried]
        found.tuning = pd.DataFrame(scores)
        found.chosen = pd.DataFrame([{**cell, "value": 1.0} for cell in ablation.cells()])
        found.tuned_key, found.tuning_grid = "optimizer.lr", [0.01, 0.1, 1.0]
        found.tuning_metric, found.tuning_mode = "val/accuracy", "max"
    return found


def spoiled() -> Results:
    found = results()
    at = (found.runs["norm"] == "none") & (found.runs["data.batch_size"] == "2")
    found.runs.loc[at, ["status", "error", "test/accuracy"]] = ["diverged", "the loss is inf in step 3", math.nan]
    one = (found.runs["norm"] == "groupnorm") & (found.runs["data.batch_size"] == "8") & (found.runs["seed"] == 1)
    found.runs.loc[one, ["status", "error", "test/accuracy"]] = ["failed", "a bug", math.nan]
    return found


@pytest.fixture(scope="module")
def spoiled_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A report on results some of which are missing, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("spoiled")
    return write_report(spoiled(), folder), folder / "report"


def test_the_verdict_is_what_the_numbers_are() -> None:
    report = compose_report(results())
    assert report.facts == ["45 of 45 runs finished: 3 of norm × 3 of batch size × 5 seeds."]
    assert report.verdicts[0] == "test accuracy, 6 comparisons: 3 higher, 3 cannot tell."
    [first] = [line for line in report.verdicts if line.startswith("groupnorm against batchnorm at batch size 2: ")]
    assert re.search(r"\+0\.0\d+ \[\+0\.0\d+, \+0\.0\d+\], higher \(Holm p = \S+, n = 5\)", first)
    [other] = [line for line in report.verdicts if line.startswith("norm none against batchnorm at batch size 8: ")]
    assert re.search(r"cannot tell with n = 5; about \d+ seeds would tell a difference like this; 5 seeds tell", other)


def test_a_few_seeds_cannot_tell_and_one_says_nothing() -> None:
    assert "cannot tell with n = 1" in compose_report(results(seeds=1)).verdicts[1]
    assert "cannot tell with n = 2; " in compose_report(results(seeds=2)).verdicts[-1]


def test_runs_that_did_not_end_well_are_counted_where_they_are_missing(spoiled_report: tuple[Report, Path]) -> None:
    report, place = spoiled_report
    assert report.facts[:3] == [
        "39 of 45 runs finished: 3 of norm × 3 of batch size × 5 seeds.",
        "5 diverged: norm none, batch size 2, seed 0, norm none, batch size 2, seed 1, norm none, batch size 2, "
        "seed 2, norm none, batch size 2, seed 3, ….",
        "1 failed: groupnorm, batch size 8, seed 1.",
    ]
    text = (place / "report.md").read_text()
    assert "| 5 diverged |" in text
    assert "(4, 1 failed)" in text
    assert "the loss is inf in step 3" in text
    assert any(line.endswith("seeds without a pair: 1") for line in report.verdicts)
    nothing = "norm none against batchnorm at batch size 2: cannot tell with n = 0; seeds without a pair: 5"
    assert nothing in report.verdicts


def test_a_verdict_of_some_seeds_alone_says_so(spoiled_report: tuple[Report, Path]) -> None:
    report, place = spoiled_report
    [table] = [table for table in report.tables if table.title.startswith("test accuracy: differences")]
    assert table.header[-2:] == ["lost", "verdict"]
    [row] = [row for row in table.rows if row[0] == "groupnorm, batch size 8"]
    assert row[-2:] == ["1", "higher †"]
    [line] = [line for line in report.verdicts if line.startswith("groupnorm against batchnorm at batch size 8: ")]
    assert ", higher † (Holm p = " in line
    assert any(note.startswith("† Some seeds have no pair, because a run diverged") for note in report.notes)
    assert r"higher \dag{}" in (place / "tables.tex").read_text()
    whole = compose_report(results())
    assert not any("lost" in table.header for table in whole.tables)
    assert not any(note.startswith("†") for note in whole.notes)


UNTIL = "steps_until(val/loss <= 0.3)"


def test_a_level_that_never_gets_there_is_told_from_one_without_a_value() -> None:
    found = results(metrics=[UNTIL, "test/accuracy"])
    at = (found.runs["norm"] == "none") & (found.runs["data.batch_size"] == "2")
    found.runs.loc[at, [UNTIL, "test/accuracy"]] = math.nan
    report = compose_report(found)
    assert (
        "norm none against batchnorm at batch size 2: cannot tell with n = 0; seeds without a pair: 5 "
        "(never in 5 of 5, against 0 of 5)" in report.verdicts
    )
    cells = {table.title: table.rows for table in report.tables}
    rows = cells[f"{readable_name(UNTIL)}: mean ± standard deviation (n)"]
    assert ["norm none", "5 never"] in [row[:2] for row in rows]
    rows = cells["test accuracy: mean ± standard deviation (n)"]
    assert ["norm none", "5 without a value"] in [row[:2] for row in rows]
    drawn = Drawing(found)
    marks = {text.get_text() for ax in drawn.metric(UNTIL).axes for text in ax.texts}
    assert marks == {"never 5"}
    assert not [text for ax in drawn.metric("test/accuracy").axes for text in ax.texts]


def test_equal_differences_have_no_spread_to_judge_by() -> None:
    found = results(factors={"norm": ["batchnorm", "none"]}, metrics=[UNTIL], seeds=2)
    found.runs.loc[found.runs["norm"] == "none", UNTIL] += 20
    assert compose_report(found).verdicts == [
        f"{readable_name(UNTIL)}, 1 comparisons: 1 cannot tell.",
        "norm none against batchnorm: +20, cannot tell with n = 2: every pair differs by the same amount, so there is "
        "no spread to judge by",
    ]


def test_cells_whose_baseline_is_excluded_are_counted() -> None:
    report = compose_report(results(exclude=[{"norm": "batchnorm", "data.batch_size": 2}]))
    assert "2 cells have no baseline, which is excluded: they are compared with nothing." in report.notes


def test_tuning_runs_that_did_not_end_well_are_counted() -> None:
    found = results(tune=True)
    assert found.tuning is not None
    assert not any("tuning runs" in note for note in compose_report(found).notes)
    found.tuning.loc[[0, 1], ["status", "score"]] = ["diverged", math.nan]
    assert "Not all of the 27 tuning runs ended well: 25 finished, 2 diverged." in compose_report(found).notes


def test_every_form_of_the_report_is_written_and_the_page_needs_nothing_else(tmp_path: Path) -> None:
    report = write_report(results(tune=True), tmp_path)
    place = tmp_path / "report"
    for name, _ in report.figures:
        for suffix in ("pdf", "png", "svg"):
            assert (place / "figures" / f"{name}.{suffix}").stat().st_size > 2000
    assert {name for name, _ in report.figures} >= {
        "test_accuracy",
        "differences",
        "heat_map",
        "tuning",
        "curves_val_loss",
    }
    page = (place / "report.html").read_text()
    assert page.count("<img ") == page.count("data:image/svg+xml;base64,") == len(report.figures)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for name in ("runs", "cells", "comparisons"):
        assert len(pd.read_csv(place / f"{name}.csv"))
    tex = (place / "tables.tex").read_text()
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == len(report.tables)
    assert not list(place.glob(".*")), "nothing half written"


def test_a_rate_at_the_edge_of_its_grid_is_flagged() -> None:
    notes = compose_report(results(tune=True)).notes
    assert notes[0].startswith("Each cell has its own learning rate, the best of 0.01, 0.1, 1 by validation accuracy: ")
    assert (
        sum(note.startswith("WARNING: ") and "1, is the largest that was tried; widen" in note for note in notes) == 9
    )


SHAPES = {
    "one factor": {"factors": {"norm": NORMS}},
    "one of numbers": {"factors": {"data.batch_size": SIZES}, "baseline": {"data.batch_size": 8}},
    "three": {"factors": {"norm": NORMS[:2], "data.batch_size": SIZES[:2], "model.depth": [8, 14]}},
    "no baseline": {"baseline": None},
    "a single level": {"factors": {"norm": ["batchnorm"], "data.batch_size": [2]}},
    "many": {"factors": {"norm": NORMS, "data.batch_size": list(range(20))}},
}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=[pytest.mark.thorough] * (shape in ("one of numbers", "many"))) for shape in SHAPES],
)
def test_a_grid_of_any_shape_has_a_report(tmp_path: Path, shape: str) -> None:
    report = write_report(results(seeds=2, **SHAPES[shape]), tmp_path)
    assert report.tables
    assert report.figures


def test_nothing_finished_is_no_report() -> None:
    found = results()
    found.runs["status"] = "missing"
    with pytest.raises(ConfigError, match=r"made_up: none of its 45 runs has finished \(45 missing\)"):
        compose_report(found)


def test_means_over_a_third_factor_are_not_drawn_as_cells() -> None:
    assert "heat_map" in {name for name, _, _ in figures(results())}
    assert "heat_map" not in {name for name, _, _ in figures(results(**SHAPES["three"]))}


def test_a_curve_of_one_validation_is_a_point_and_a_band_is_whole() -> None:
    found = results(factors={"norm": ["batchnorm", "none"]}, seeds=2)
    for i, curve in enumerate(found.curves.values()):
        curve["val/loss"] = [0.5 + i % 2, *[math.nan] * 4]
        curve["train/loss"] = 0.5 + i
    lines = [line for ax in Drawing(found).curves("val/loss").axes for line in ax.lines]
    assert {line.get_marker() for line in lines} == {"o"}
    lows = [
        band.get_paths()[0].vertices[:, 1].min() for band in Drawing(found).curves("train/loss").axes[0].collections
    ]
    assert min(lows) < 0, "the axis is linear: a band goes as far as it goes"


def test_a_level_that_says_nothing_alone_is_named_with_its_factor() -> None:
    cell = {"norm": "none", "norm.affine": "true", "data.batch_size": "full", "model.norm": "layernorm"}
    assert cell_label(cell) == "norm none, affine true, batch size full, layernorm"


def test_a_level_has_one_colour_in_all_figures() -> None:
    drawing = Drawing(results())
    assert (drawing.colour, drawing.axis) == ("norm", "data.batch_size")
    looks = [drawing.style(level)["color"] for level in NORMS]
    assert len(set(looks)) == 3
    for name, _, figure in figures(results()):
        if name in ("test_accuracy", "curves_val_loss"):
            lines = {line.get_label(): line.get_color() for ax in figure.axes for line in ax.lines}
            assert [lines[level] for level in NORMS] == looks


def test_names_are_those_that_a_person_says() -> None:
    assert readable_name("data.batch_size") == "batch size"
    assert readable_name("optimizer.lr") == "learning rate"
    assert readable_name("last(train/loss)") == "last(training loss)"
    assert is_numeric(["1", "8", "full"])
    assert not is_numeric(["1", "none"])


@pytest.mark.parametrize("terminal", [False, True])
def test_colours_are_for_terminals(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_report(compose_report(results()), Path(), Console(force_terminal=terminal, width=140))
    assert ("\x1b[" in capsys.readouterr().out) == terminal


STRANGE = "[red]$x^2$ <b>*bold*</b> {a}_b ~~c~~ [l](http://x) | :fire: [/] \\x"


def test_what_a_report_is_about_is_text_and_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norms = [STRANGE, "batchnorm", "$", "[/bold]"]
    found = results(seeds=2, question=f"Is {STRANGE} better?\n# no heading", factors={"norm": ["batchnorm"]})
    frames = []
    for norm in norms:
        frames.append(found.runs.assign(norm=norm))
    found.ablation = Ablation(**{**found.ablation.arguments, "factors": {"norm": norms}})
    found.runs = pd.concat(frames, ignore_index=True)
    report = write_report(found, tmp_path)
    print_report(report, tmp_path, Console(width=400, force_terminal=False))
    printed = capsys.readouterr().out
    assert f"Is {STRANGE} better? # no heading" in printed
    html = (tmp_path / "report" / "report.html").read_text()
    assert "<b>" not in html
    assert "&lt;b&gt;*bold*&lt;/b&gt;" in html
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\n# no heading" not in text
    assert r"[l\](http://x)" in text
    assert r"\<b>\*bold\*\</b>" in text
    tables = (tmp_path / "report" / "tables.tex").read_text()
    assert r"[red]\$x\textasciicircum{}2\$ $<$b$>$" in tables
    assert "\n[" not in tables, "the end of a row would take it for an argument"


def test_verdicts_are_read_again_as_they_were(tmp_path: Path) -> None:
    from ablab.lab.ablation.report import markdown
    from ablab.lab.browse.collect import read_verdicts

    report = compose_report(results())
    report.verdicts = [STRANGE, *report.verdicts]
    (tmp_path / "report.md").write_text(markdown(report))
    assert read_verdicts(tmp_path / "report.md") == report.verdicts


def test_a_progress_shows_labels_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = Run(PlannedRun({"norm": "[red]x[/] :fire: [/bold]"}, 0, ()))
    progress = Progress([run])
    progress.run_ended(run, "finished")
    assert "norm=[red]x[/] :fire: [/bold] seed=0: finished" in capsys.readouterr().out
    console = Console(width=200)
    with console.capture() as shown:
        console.print(progress.table())
    assert "norm=[red]x[/] :fire: [/bold]" in shown.get()


def test_a_metric_that_no_run_has_a_finite_value_of_is_drawn_nowhere(tmp_path: Path) -> None:
    found = results(seeds=1)
    for metric, value in zip(found.ablation.metrics, (np.nan, np.inf), strict=True):
        found.runs[metric] = value
    for curve in found.curves.values():
        curve.loc[1:, "val/loss"] = np.inf
        curve["train/loss"] = np.nan
    report = write_report(found, tmp_path)
    assert [name for name, _ in report.figures] == ["curves_val_loss"]
    assert {row[-1].removesuffix(" †") for row in report.tables[0].rows} == {"cannot tell"}


def test_no_value_is_called_the_best_where_none_gave_a_result() -> None:
    found = results(tune=True)
    assert found.tuning is not None
    found.tuning.loc[found.tuning["norm"] == "none", "score"] = np.nan
    found.tuning.loc[found.tuning["norm"] == "none", "status"] = "diverged"
    notes = compose_report(found).notes
    assert sum("norm none" in note and "no tuning run has a validation accuracy" in note for note in notes) == 3
    assert not any("norm none" in note and "its best" in note for note in notes)


# From the folder of runs that there really are ----------------------------------------------------------------------


RECORD: dict[str, Any] = {
    "id": "abcd1234",
    "status": "finished",
    "identity": {"run": "c" * 16, "config": "d" * 16, "code": "a" * 16, "data": "e" * 16},
    "data": {"fingerprint": "e" * 64},
    "overrides": [],
    "git_commit": "f" * 40,
    "processes": 1,
    "batch_sizes": {"optimizer": 32, "forward": 32, "norm": 32},
    "seconds": 1.0,
}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, of one ablation."""
    folder = tmp_path_factory.mktemp("ablation")
    content = {"name": "two", "factors": {"norm": ["batchnorm", "none"]}, "seeds": [0], "baseline": {"norm": "none"}}
    runs = [{"folder": norm, "cell": {"norm": norm}, "seed": 0} for norm in ("batchnorm", "none")]
    (folder / "ablation.json").write_text(
        json.dumps({"command": "", "ablation": content, "runs": runs, "tuning": None})
    )
    for i, norm in enumerate(("batchnorm", "none")):
        (folder / norm).mkdir()
        record = {**RECORD, "metrics": {"test/accuracy": 0.9 + i / 100}}
        (folder / norm / "run.json").write_text(json.dumps(record))
        (folder / norm / "metrics.csv").write_text("step,epoch,train/loss,val/loss\n10,0,1.5,\n20,0,1.0,0.9\n")
    return folder


def test_the_folder_alone_makes_the_report(
    ablation: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = command(str(ablation), script="scripts/report.py")
    assert result.returncode == 0, result.stderr
    assert "2 of 2 runs finished" in result.stdout
    assert "cannot tell" in result.stdout
    assert (ablation / "report" / "report.html").exists()


def test_other_cells_can_be_compared_with(ablation: Path, command: Callable[..., Any]) -> None:
    words = (str(ablation), "--baseline")
    result = command(*words, "norm=batchnorm", script="scripts/report.py")
    assert "test accuracy: differences to batchnorm" in result.stdout, result.stderr
    result = command(*words, "norm=layernorm", script="scripts/report.py")
    assert result.returncode == 2
    assert result.stderr == "error: ablation.baseline.norm=layernorm: it is no level; norm has: batchnorm, none\n"


def test_a_half_done_ablation_says_what_is_missing(ablation: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(ablation, tmp_path / "half"))
    (folder / "none" / "run.json").unlink()
    report = compose_report(read_results(folder))
    assert report.facts[1] == "1 missing: norm none, seed 0."
    (folder / "batchnorm" / "run.json").unlink()
    with pytest.raises(ConfigError, match="none of its 2 runs has finished"):
        compose_report(read_results(folder))


def test_runs_of_different_code_are_not_mixed_unless_told(ablation: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(ablation, tmp_path / "mixed"))
    record = json.loads((folder / "none" / "run.json").read_text())
    (folder / "none" / "run.json").write_text(
        json.dumps({**record, "identity": {**record["identity"], "code": "b" * 16}})
    )
    with pytest.raises(ConfigError, match=r"its runs were made by different code: 1 by aaaaaaaa .*; 1 by bbbbbbbb"):
        read_results(folder)
    [note] = compose_report(read_results(folder, mix_code=True)).notes
    assert note.startswith("The runs were made by different code: ")


def test_what_is_no_ablation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is no ablation's folder"):
        read_results(tmp_path)


def test_metrics_are_read_from_the_record_and_the_curves(ablation: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(ablation, tmp_path / "metrics"))
    record = json.loads((folder / "ablation.json").read_text())
    wanted = {
        "test/accuracy": 0.9,
        "last(train/loss)": 1.0,
        "mean(train/loss)": 1.25,
        "max(train/loss)": 1.5,
        "min(val/loss)": 0.9,
        "steps_until(train/loss <= 1.2)": 20,
        "steps_until(train/loss <= 0.1)": math.nan,
        "steps_until(train/loss >= 1.5)": 10,
    }
    record["ablation"]["metrics"] = list(wanted)
    (folder / "ablation.json").write_text(json.dumps(record))
    row = read_results(folder).runs.iloc[0]
    for metric, value in wanted.items():
        assert row[metric] == pytest.approx(value, nan_ok=True), metric
    record["ablation"]["metrics"] = ["last(train/los)"]
    (folder / "ablation.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"train/los was never logged; did you mean train/loss\?"):
        read_results(folder)


def test_a_run_that_lacks_what_another_logs_has_no_value(ablation: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(ablation, tmp_path / "lacks"))
    (folder / "batchnorm" / "metrics.csv").write_text("step,epoch,train/loss,val/loss,norms/mean\n10,0,1.5,0.9,0.25\n")
    record = json.loads((folder / "ablation.json").read_text())
    record["ablation"]["metrics"] = ["last(norms/mean)"]
    (folder / "ablation.json").write_text(json.dumps(record))
    batchnorm, none = read_results(folder).runs["last(norms/mean)"]
    assert batchnorm == 0.25
    assert math.isnan(none)
    assert (
        compose_report(read_results(folder)).verdicts[1]
        == "batchnorm against norm none: cannot tell with n = 0; seeds without a pair: 1"
    )


@dataclass(eq=False)
class Run:
    """What a progress asks of a run."""

    plan: PlannedRun
    is_done: bool = False
    status: str = "missing"


def test_a_metric_is_looked_for_once_every_cell_has_a_finished_run() -> None:
    cells = [{"norm": norm} for norm in ("batchnorm", "none")]
    runs: list[Any] = [Run(PlannedRun(cell, seed, ())) for seed in (0, 1) for cell in cells]
    looked: list[list[Any]] = []
    progress = Progress(runs, check_first_runs=looked.append)
    progress.run_ended(runs[0], "finished")
    progress.run_ended(runs[2], "finished")
    assert not looked
    progress.run_ended(runs[1], "finished")
    assert looked == [[runs[0], runs[1]]]


def test_a_tuning_that_is_not_complete_is_said(ablation: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(ablation, tmp_path / "tuning"))
    record = json.loads((folder / "ablation.json").read_text())
    record["ablation"]["tune"] = {"key": "optimizer.lr", "values": [0.1, 1.0]}
    tried = [{**run, "value": 0.1} for run in record["runs"]] + [{**record["runs"][0], "folder": "x", "value": 1.0}]
    record["tuning"] = {"metric": "val/accuracy", "mode": "max", "runs": tried, "chosen": []}
    record["runs"] = []
    (folder / "ablation.json").write_text(json.dumps(record))
    with pytest.raises(
        ConfigError, match=r"two: its tuning is not complete \(2 finished, 1 missing\); the ablation's co"
    ):
        compose_report(read_results(folder))


def test_a_report_without_comparisons_goes_to_wandb_without_them(
    ablation: Path, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    import shutil

    folder = Path(shutil.copytree(ablation, tmp_path / "alone"))
    record = json.loads((folder / "ablation.json").read_text())
    record["ablation"]["baseline"] = None
    (folder / "ablation.json").write_text(json.dumps(record))
    result = command(str(folder), "--wandb", "ablab", script="scripts/report.py", WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    assert "W&B: " in result.stdout
