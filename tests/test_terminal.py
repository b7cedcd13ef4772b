"""The terminal: completion, help on one screen, what is said of what takes long, plain output where nobody watches."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig
from tests import forked
from tests.polling import LIMIT

from ablab import status
from ablab.errors import STOPPED, Stopped
from ablab.lab.ablation.ablation import Ablation
from ablab.lab.ablation.grid import Grid, PreparedRun
from ablab.lab.config import help
from ablab.lab.run import signals
from ablab.lab.train import train
from ablab.screen import wrap_to_terminal

ROOT = Path(__file__).parents[1]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
COLOUR = re.compile(r"\x1b\[(\d+;)*(3|4|9|10)\d[\d;]*m")  # bold and italic are none


# Completion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("norm=gro", {"norm=groupnorm", "norm=groupnorm_weightstandardization"}),
        ("norm/weight=weight_n", {"norm/weight=weight_norm"}),
        ("model=rnn model.hid", {"model.hidden_size="}),
    ],
)
def test_completion_of_hydra_offers_choices_and_keys(command: Command, typed: str, offered: set[str]) -> None:
    result = command("-sc", "query=bash", COMP_LINE=f"python train.py {typed}")
    assert (result.returncode, result.stderr) == (0, "")
    assert set(result.stdout.split()) == offered


# Help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        *(("40", 80), ("300", 120)),
        *(pytest.param(*pair, marks=pytest.mark.thorough) for pair in (("80", 80), ("100", 100))),
    ],
)
def test_help_is_as_wide_as_the_terminal_within_80_and_120(command: Command, columns: str, width: int) -> None:
    lines = command("--help", COLUMNS=columns).stdout.splitlines()
    assert width - 20 < max(map(len, lines)) <= width


@pytest.fixture(scope="module")
def shown() -> str:
    """The help on a screen of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80"}
    return forked.run(ROOT / "train.py", ["--help"], folder=ROOT, environment=environment, timeout=LIMIT).stdout


def test_help_fits_on_a_screen_of_50_lines(shown: str) -> None:
    lines = shown.splitlines()
    menu = [line for line in lines if re.match(r"  [a-z/_]+  |        ", line) and not line.startswith("  python")]
    assert len(lines) - len(menu) <= 18, "the rest is the menu, which grows with the project: 31 lines as it is shipped"


def test_help_lists_every_choice_the_important_groups_first(shown: str) -> None:
    groups = re.findall(r"^  ([a-z_/]+)  +[a-z]", shown.partition("Groups and")[2], re.MULTILINE)
    assert groups[:5] == ["model", "model/qk_norm", "norm", "norm/weight", "data"]
    words = {word.strip("*,") for word in shown.split()}
    choices = [file for file in (ROOT / "conf").glob("*/*.yaml") if file.parent.name != "hydra"]
    assert {file.stem for file in choices} <= words


def test_help_shows_an_ablation_that_forks_have_too(shown: str) -> None:
    assert "python train.py ablation=norm_batch_size " in shown


def test_help_marks_what_the_command_has(command: Command, shown: str) -> None:
    assert {"resnet*", "batchnorm*", "digits*", "sgd*"} <= set(re.findall(r"\w+\*", shown))
    marked = set(re.findall(r"\w+\*", command("model=rnn", "norm=none", "--help").stdout))
    assert {"rnn*", "none*", "digits_rows*", "adamw*"} <= marked
    assert not {"batchnorm*", "layernorm*"} & marked


def test_the_groups_of_a_fork_come_behind(tmp_path: Path) -> None:
    for group in ("zeta", "norm", "model", "alpha"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "one.yaml").touch()
    (tmp_path / "train.yaml").touch()
    lines = help.format_menu(tmp_path, ("model", "norm"), {"norm": "one"}).splitlines()
    assert [line.split() for line in lines] == [["model", "one"], ["norm", "one*"], ["alpha", "one"], ["zeta", "one"]]


@pytest.mark.parametrize(
    "words",
    [
        ["--info", "defaults"],
        ["--info", "config"],
        ["--info", "searchpath"],
        ["--info", "plugins"],
        ["--info", "defaults", "model=rnn"],
        ["--cfg", "job"],
        ["--cfg", "job", "-p", "norm", "norm=groupnorm"],
        ["--cfg", "job", "--resolve"],
        ["--cfg", "hydra"],
        ["--hydra-help"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_what_asks_for_information_gets_it_and_leaves_nothing_behind(
    command: Command, tmp_path: Path, words: list[str]
) -> None:
    result = command(*words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir())


# Progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "next_delay", lambda *arguments: 0.01)


def until(said: Callable[[], str], words: str) -> str:
    """What has been said by the time that some words are."""
    found = ""
    deadline = time.monotonic() + LIMIT
    while not re.search(words, found):
        assert time.monotonic() < deadline, f"{words!r} is not said, but {found!r}"
        time.sleep(0.01)
        found += said()
    return found


@pytest.mark.usefixtures("_impatient")
def test_what_takes_long_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with status.status_lines("reading the data"):
        until(lambda: capsys.readouterr().out, r"reading the data: \d+ s\n")
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == "", "it is over"


@pytest.mark.usefixtures("_impatient")
def test_what_is_done_with_many_things_says_how_far_it_is_and_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def slowly() -> Iterator[int]:
        yield 1
        until(lambda: capsys.readouterr().out, r"decoding images: 1 of 2, \d+ s left\n")
        capsys.readouterr()
        until(lambda: capsys.readouterr().out, "decoding images")
        yield 2

    with status.status_lines("reading the data"):
        assert list(status.with_progress(slowly(), 2, "decoding images")) == [1, 2]
        until(lambda: capsys.readouterr().out, "reading the data")


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with status.status_lines("reading the data"):
        assert list(status.with_progress([1, 2], 2, "decoding images")) == [1, 2]
    assert capsys.readouterr().out == ""


def test_what_fails_within_is_over(tmp_path: Path) -> None:
    def refuse(words: object) -> DictConfig:
        raise ValueError(f"{words}: refused")

    ablation = Ablation(name="refused", factors={"norm": ["none", "batchnorm"]}, seeds=[0])
    grid = Grid(ablation, [], refuse, tmp_path)
    plans = list(ablation.runs())
    with pytest.raises(ValueError, match="refused") as composing:  # its traceback keeps what has been begun
        grid.prepare_all(plans)
    assert not status.running
    broken = [PreparedRun(plan, None, None, tmp_path, []) for plan in plans]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NoneType") as trying:
        grid.check_runs(broken)
    assert not status.running
    assert composing.traceback
    assert trying.traceback


@pytest.mark.usefixtures("_impatient")
def test_a_program_whose_output_others_read_says_so_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with status.only_on_a_terminal(), status.status_lines("reading the data"):
        time.sleep(0.05)
    assert capsys.readouterr().out == ""
    with status.status_lines("reading the data"):
        until(lambda: capsys.readouterr().out, "reading the data")


@pytest.mark.parametrize(
    "script", ["evaluate", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("report", "reproduce"))]
)
def test_what_a_script_prints_into_a_pipe_is_what_it_found(command: Command, script: str) -> None:
    result = command("nowhere", script=f"scripts/{script}.py", PYTHONUNBUFFERED="1")  # in a process that loads torch
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


def test_what_a_script_prints_on_a_terminal_begins_with_what_it_waits_for(terminal: Callable[..., str]) -> None:
    fresh = ("-u", str(ROOT / "scripts" / "report.py"), "nowhere")  # a process that has loaded nothing yet
    shown = terminal(program=fresh, returncode=2)
    assert shown.startswith("loading torch and Lightning\nerror: ")


def test_the_lines_become_rarer() -> None:
    said, now = [], 0.0
    while now < 3600:
        now += status.next_delay(now)
        said.append(now)
    assert said[:6] == [2, 4, 8, 16, 32, 64]
    assert len(said) < 70


def test_a_start_from_nothing_says_at_once_that_it_loads(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "train.py"), "data.batch_size=0"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[0] == "loading torch and Lightning"
    assert done.stderr.startswith("error: data.batch_size=0: ")
    quiet = subprocess.run([*program, "quiet=true"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert quiet.stdout == ""
    assert quiet.stderr == done.stderr


@pytest.mark.parametrize("script", ["evaluate", "report", "reproduce"])
def test_the_help_of_a_script_does_not_wait_for_torch(command: Command, script: str) -> None:
    result = command("--help", script=f"scripts/{script}.py", PYTHONPROFILEIMPORTTIME="1")
    loaded = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.stdout.startswith("usage: ")
    assert not {"torch", "lightning", "pandas"} & loaded


# Plain, and quiet --------------------------------------------------------------------------------------------------

SWEEP = ("-m", "seed=0,1", "trainer=smoke", "logger=csv")
RESULTS = r"\nbest checkpoint by +val/accuracy [\d.]+\ntest/accuracy .*\ntest/calib.*\ntest/loss .*\nrun +runs/\S+\n"


def test_a_run_in_a_pipe_is_plain(command: Command) -> None:
    said = command("trainer=smoke", "logger=csv")
    assert said.stderr == ""
    assert re.search(r"^epoch 1, step 1/1: ", said.stdout, re.MULTILINE)
    assert not {"\r", "\x1b"} & set(said.stdout)


def test_a_quiet_run_prints_what_came_out_and_nothing_else(command: Command) -> None:
    said = command("trainer=smoke", "quiet=true")
    assert re.fullmatch(RESULTS, said.stdout)
    assert said.stderr == ""


def test_a_quiet_run_goes_on_and_is_the_same_run(command: Command, tmp_path: Path) -> None:
    command("trainer=smoke", "logger=csv", "quiet=true")
    [folder] = (tmp_path / "runs").iterdir()
    again = command(f"resume={folder}", "quiet=false")
    assert "this run has finished" in again.stdout
    assert (again.returncode, again.stderr) == (0, "")


def test_a_quiet_run_that_is_stopped_says_how_to_go_on(
    config: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(signals, "requested", signal.SIGTERM)
    with pytest.raises(Stopped):
        train(config("trainer=smoke", "logger=csv", "quiet=true", f"output_dir={tmp_path}/runs"))
    line = r"stopped by SIGTERM after step 0; go on with: python train\.py resume=\S+\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_a_quiet_sweep_that_is_stopped_says_how_to_go_on(command: Command, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped.py"
    stopped.write_text(
        "import runpy, signal\n"
        "from ablab.lab.run import signals\n"
        "signals.requested = signal.SIGTERM  # as if it came before the first step\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    result = command(*SWEEP, "quiet=true", script=str(stopped))
    assert (result.returncode, result.stderr) == (STOPPED, "")
    words = f"python {ROOT / 'train.py'} {' '.join(SWEEP)} quiet=true"
    assert result.stdout == f"stopped by SIGTERM; go on with: {words}\n"


@pytest.mark.slow
def test_a_sweep_in_a_pipe_is_plain_and_a_quiet_one_prints_its_report_alone(command: Command) -> None:
    said = command(*SWEEP)
    assert said.stderr == ""
    assert said.stdout.count(": finished (") == 2
    assert not {"\r", "\x1b"} & set(said.stdout)
    quiet = command(*SWEEP, "quiet=true")
    assert quiet.stderr == ""
    first, *rest = quiet.stdout.strip().splitlines()
    assert first in said.stdout
    assert rest[-1].startswith("report: ")
    assert ": finished (" not in quiet.stdout


@pytest.mark.slow
def test_a_terminal_that_cannot_move_gets_lines(terminal: Callable[..., str]) -> None:
    for words in (("trainer=smoke", "logger=csv"), SWEEP):
        shown = terminal(*words, TERM="dumb")
        assert not {"\r", "\x1b"} & set(shown)
    assert shown.count(": finished (") == 2


@pytest.mark.slow
def test_colour_is_for_those_who_want_it(terminal: Callable[..., str]) -> None:
    assert COLOUR.search(terminal(*SWEEP))
    assert not COLOUR.search(terminal(*SWEEP, "name=other", NO_COLOR="1"))


def test_a_file_gets_lines_where_errors_go_to_a_terminal(terminal: Callable[..., str], tmp_path: Path) -> None:
    line = f"{sys.executable} {ROOT / 'train.py'} trainer=smoke logger=csv > log.txt"
    assert terminal(program=("-c", f"import subprocess; subprocess.run({line!r}, shell=True, check=True)")) == ""
    said = (tmp_path / "log.txt").read_text()
    assert "\nepoch 1, step 1/1: " in said
    assert not {"\r", "\x1b"} & set(said)


def test_an_error_on_a_terminal_breaks_between_words_and_begins_its_line(terminal: Callable[..., str]) -> None:
    shown = terminal("norm=gruopnorm", returncode=2).splitlines()
    assert max(map(len, shown)) <= 80
    assert shown[0].startswith("error: norm=gruopnorm: there is no such choice; did you mean groupnorm? norm")
    assert " ".join(line.strip() for line in shown).endswith("weightnorm, weightnorm_meanonlybatchnorm")
    diverged = terminal("optimizer.lr=1e30", "trainer.max_epochs=1", "logger=csv", returncode=3)
    *_, last = re.split(r"error: ", diverged, maxsplit=1)[0].split("\n")
    assert re.split(r"\r", last)[-1].strip() == "", "the bar has left the line to the error"


def test_a_text_is_broken_for_a_terminal_and_left_alone_for_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Screen:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    text = "short\n  and a longer line of runs/2026-11-23_14-03-22_run words"
    assert wrap_to_terminal(text, Screen()).splitlines() == [  # type: ignore[arg-type]
        "short",
        "  and a longer line",
        "      of",
        "      runs/2026-11-23_14-03-22_run",
        "      words",
    ]
    with (tmp_path / "file").open("w") as file:
        assert wrap_to_terminal(text, file) == text
