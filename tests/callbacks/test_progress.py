"""What is shown while training: lines in a log, a bar on a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest


def test_a_log_gets_a_line_with_metrics_and_the_time_that_is_left(run: Callable[..., SimpleNamespace]) -> None:
    printed = run("trainer.max_epochs=2", "trainer.max_steps=-1").printed
    [line] = [line for line in printed.splitlines() if line.startswith("epoch")]
    assert re.fullmatch(
        r"epoch 2, step 2/2: train/accuracy [\d.]+, train/loss [\d.]+, "
        r"val/accuracy [\d.]+, val/loss [\d.]+; \d+ s, done",
        line,
    )


def test_a_terminal_gets_a_bar(terminal: Callable[..., str]) -> None:
    shown = terminal("trainer.max_epochs=2", "logger=csv", columns=150)
    bars = [line for line in re.split(r"[\r\n]+", shown) if line.startswith("Epoch")]
    assert any(re.search(r" \d+/35, .*run=.*val/accuracy=.*train/loss=", bar) for bar in bars), shown[-2000:]


def test_a_long_epoch_validation_and_test_say_how_far_they_are(
    run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ablab.callbacks.progress.next_delay", lambda *arguments: 0.0)  # every batch takes long
    printed = run(
        *("trainer.max_epochs=1", "trainer.max_steps=-1"),
        *(f"trainer.limit_{part}_batches=2" for part in ("train", "val", "test")),
    ).printed
    lines = [line for line in printed.splitlines() if re.match("epoch|validation|test:", line)]
    assert [re.match(r"[^:]*: batch \d of \d|[^:]*", line)[0] for line in lines] == [  # type: ignore[index]
        "epoch 1, step 1/2",
        "epoch 1, step 2/2",
        "validation: batch 1 of 2",
        "validation: batch 2 of 2",
        "epoch 1, step 2/2",
        "test: batch 1 of 2",
        "test: batch 2 of 2",
    ]
