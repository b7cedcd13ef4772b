"""Predictions for new inputs: read as the run's data were, and the same numbers as in its test."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes

from ablab.data.breast_cancer import BreastCancer
from ablab.data.digits import Digits
from ablab.errors import ConfigError
from ablab.lab.evaluate import assemble_with_weights, scoring_config
from ablab.lab.predict import predict

Start = Callable[..., SimpleNamespace]
WORDS = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=20"]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_images_get_the_classes_of_the_runs_own_test(run: Start, tmp_path: Path) -> None:
    folder = run(*WORDS).folder
    data = Digits(batch_size=8)
    data.setup()
    assert data.splits is not None
    test = data.splits.test[range(300)]
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for i, image in enumerate(test.inputs[:, 0]):
        pixels = (image.float().numpy() * 255 / 16).round().astype(np.uint8)
        Image.fromarray(pixels).save(images / ("more" if i % 2 else "") / f"{i:03}.png")
    (images / "notes.txt").write_text("not an image")
    assert predict(folder, images, tmp_path / "out.csv") == 300
    rows = rows_of(tmp_path / "out.csv")
    parts = assemble_with_weights(folder, scoring_config(folder))
    parts.task.eval()
    with torch.inference_mode():
        expected = parts.model(data.on_after_batch_transfer(test, 0).inputs).softmax(-1)
    for row in rows:
        number = int(Path(row["file"]).stem)
        found = [float(row[f"probability/{digit}"]) for digit in range(10)]
        assert found == pytest.approx(expected[number].tolist(), abs=0.05)  # a pixel of 8 bits is rounded
        assert sum(found) == pytest.approx(1, abs=1e-5)
        assert row["class"] == str(np.argmax(found))
    accuracy = np.mean([int(row["class"]) == int(test.targets[int(Path(row["file"]).stem)]) for row in rows])
    assert accuracy > 0.5


def test_one_image_is_scaled_to_the_training_size(run: Start, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "white").save(tmp_path / "one.png")
    assert predict(run(*WORDS).folder, tmp_path / "one.png", tmp_path / "out.csv", weights="last") == 1
    assert rows_of(tmp_path / "out.csv")[0]["file"] == "one.png"


def test_rows_of_a_table_get_numbers_in_the_targets_unit(run: Start, tmp_path: Path) -> None:
    folder = run("trainer=cpu", "trainer.max_epochs=10", "model=mlp", "data=diabetes").folder
    frame = load_diabetes(as_frame=True, scaled=False).frame
    shuffled = frame.sample(frac=1, random_state=0)[frame.columns[::-1]]  # columns are found by their names
    shuffled.to_csv(tmp_path / "rows.csv", index=False)
    assert predict(folder, tmp_path / "rows.csv", tmp_path / "out.csv") == len(frame)
    found = pd.read_csv(tmp_path / "out.csv")
    assert list(found.columns) == ["row", "progression"]
    assert list(found["row"]) == list(range(1, len(frame) + 1))
    assert abs(found["progression"].mean() - frame["target"].mean()) < 40
    assert np.corrcoef(found["progression"], shuffled["target"])[0, 1] > 0.3


def test_rows_of_a_table_get_classes(run: Start, tmp_path: Path) -> None:
    folder = run(*WORDS, "model=mlp", "data=breast_cancer").folder
    cancer = load_breast_cancer(as_frame=True)
    data = BreastCancer(batch_size=8)
    data.setup()
    cancer.data.set_axis(data.feature_names, axis=1).to_parquet(tmp_path / "rows.parquet")
    predict(folder, tmp_path / "rows.parquet", tmp_path / "out.csv")
    found = pd.read_csv(tmp_path / "out.csv")
    assert (found["class"] == cancer.target_names[cancer.target]).mean() > 0.85


def test_lines_of_a_text_are_scored_and_continued(run: Start, tmp_path: Path) -> None:
    folder = run(*WORDS, "model=transformer", "data=text", "data.context_length=16").folder
    lines = ["The value of a name is an object", "", "a", "A class definition is an executable statement"]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    assert predict(folder, tmp_path / "text.txt", tmp_path / "out.csv", num_tokens=7) == 3
    first, letter, last = rows_of(tmp_path / "out.csv")
    assert (first["line"], letter["line"], last["line"]) == ("1", "3", "4")
    assert int(first["tokens"]) == len(lines[0])
    assert float(first["perplexity"]) == pytest.approx(math.exp(float(first["loss"])))
    assert letter["loss"] == ""
    assert all(len(row["continuation"]) == 7 for row in (first, letter, last))


def test_what_does_not_fit_is_refused_before_anything_is_written(run: Start, tmp_path: Path) -> None:
    images, out = run(*WORDS).folder, tmp_path / "out.csv"
    table = run("trainer=cpu", "trainer.max_epochs=10", "model=mlp", "data=diabetes").folder
    text = run(*WORDS, "model=transformer", "data=text", "data.context_length=16").folder
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("age,bmi\n1,2\n")
    (tmp_path / "strange.txt").write_text("fine\nnot in it: ☃\n")
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "there.csv").write_text("")
    for folder, source, message in (
        (images, "missing", "source=.*missing: there is no such file or folder"),
        (images, "empty", "there is no image in it"),
        (images, "bad.png", "bad.png: it cannot be decoded"),
        (table, "empty", "it is a folder; a .csv or .parquet file is needed"),
        (table, "rows.csv", "rows.csv has no such column"),
        (text, "strange.txt", "line 2: the vocabulary has no '☃'"),
        (text, "empty", "cannot be read as UTF-8 text"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict(folder, tmp_path / source, out)
        assert not out.exists()
    with pytest.raises(ConfigError, match=r"there\.csv: it exists"):
        predict(images, tmp_path / "bad.png", tmp_path / "there.csv")
    with pytest.raises(ConfigError, match="there is no folder"):
        predict(images, tmp_path / "bad.png", tmp_path / "none" / "out.csv")
    assert not list(tmp_path.glob("*.tmp"))
