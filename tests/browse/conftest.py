"""Real runs, made once; hundreds of copies of one of them; and the page in a real browser."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from tests import forked
from tests.polling import LIMIT

from ablab.lab.browse.collect import collect
from ablab.lab.browse.page import NAME, write

ROOT = Path(__file__).parents[2]
BRIEF = ["trainer.max_epochs=3", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1", "logger=csv"]
BRIEF += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
NORMS = {"batchnorm": "BatchNorm", "groupnorm": "GroupNorm", "layernorm": "LayerNorm"}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs as commands leave it: a sweep of four, a smoke run, one that diverged. To be read only."""
    place = tmp_path_factory.mktemp("browse")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("WANDB")}
    for words, code in (
        (["-m", "norm=batchnorm,groupnorm", "seed=0,1", "name=sweep_norm", *BRIEF], 0),
        (["trainer=smoke", "logger=csv"], 0),
        (["optimizer.lr=1e30", "logger=csv", "name=hot"], 3),
    ):
        done = forked.run(ROOT / "train.py", words, folder=place, environment=environment, timeout=LIMIT)
        assert done.returncode == code, done.stderr
    return place / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "runs", ignore=shutil.ignore_patterns("index.html")))


@pytest.fixture(scope="session")
def many(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 runs, copies of a real one with other settings and values: three norms, two batch sizes, 50 seeds."""
    real = next(made.glob("sweep_norm/norm=batchnorm,seed=0*"))
    record, config = json.loads((real / "run.json").read_text()), (real / "config.yaml").read_text()
    rows = list(csv.reader((real / "metrics.csv").read_text().splitlines()))
    root = tmp_path_factory.mktemp("many") / "runs"
    chance = random.Random(0)
    for number in range(300):
        norm, size, seed = list(NORMS)[number % 3], (8, 32)[number // 3 % 2], number // 6
        folder = root / f"2026-11-{1 + number // 12:02}_10-{number % 12:02}-00_run"
        folder.mkdir(parents=True)
        accuracy = chance.uniform(0.5, 0.99)
        words = [f"norm={norm}", f"data.batch_size={size}", f"seed={seed}", "logger=csv"]
        mine = {**record, "id": f"{number:08}", "overrides": words, "seconds": chance.uniform(1, 9000)}
        mine["choices"] = {**record["choices"], "norm": norm}
        mine["started"] = f"2026-11-{1 + number // 12:02}T10:{number % 12:02}:00+0000"
        mine["metrics"] = {"val/accuracy": accuracy, "test/accuracy": accuracy - 0.01, "test/loss": 1 - accuracy}
        if number % 50 == 7:
            mine |= {"status": "failed", "error": "RuntimeError: the disk is full", "metrics": {}}
        text = config.replace("ablab.norms.BatchNorm", f"ablab.norms.{NORMS[norm]}")
        text = re.sub(r"batch_size: 32\n", f"batch_size: {size}\n", text, count=1)
        text = re.sub(r"^( *)seed: 0$", rf"\g<1>seed: {seed}", text, flags=re.MULTILINE)
        (folder / "run.json").write_text(json.dumps(mine))
        (folder / "config.yaml").write_text(text)
        shifted = [[*row[:2], *(str(float(x) + number / 1000) if x else "" for x in row[2:])] for row in rows[1:]]
        (folder / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in [rows[0], *shifted]))
    return root


Look = Callable[..., Page]


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """Open the page of a folder, written if it is not there; nothing is complained of, nothing asked of a network."""
    complaints: list[str] = []
    pages: list[Page] = []

    def start(folder: Path, view: str = "", *, width: int = 1280, height: int = 800, **settings: Any) -> Page:
        file = folder / NAME if (folder / NAME).exists() else write(collect(folder), folder)
        page = browser.new_page(viewport={"width": width, "height": height}, **settings)
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: complaints.append(request.url) if request.url != file.as_uri() else None)
        page.set_default_timeout(LIMIT * 1000)
        page.goto(f"{file.as_uri()}#{view}")
        return page

    yield start
    for page in pages:
        page.close()
    assert complaints == []
