"""Tables: read from each format, standardized by the training rows, and errors that name file, row and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets

from ablab.data.batch import Samples
from ablab.data.breast_cancer import BreastCancer
from ablab.data.diabetes import Diabetes
from ablab.data.table import Table
from ablab.data.vectors import Vectors


def frame(rows: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, (rows, 2))
    labels = (x > 5).astype(int)
    return pd.DataFrame(
        {
            "a": x[:, 0],
            "b": x[:, 1],
            "word": ["blue", "red"] * (rows // 2),
            "y": 1000 + 50 * x.sum(1),
            "big_a": labels[:, 0],
            "big_b": labels[:, 1],
        }
    )


def write(folder: Path, table: pd.DataFrame, name: str = "x.csv") -> str:
    path = folder / name
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return str(path)


def ready(file: str, **settings: Any) -> Table:
    data = Table(train_file=file, batch_size=4, **settings)
    data.setup()
    return data


def part(data: Vectors, name: str) -> Samples:
    return getattr(data.splits, name)


def members(data: Vectors, name: str) -> list[int]:
    """The rows of a part, by their numbers."""
    rows = part(data, name).members
    assert rows is not None
    return rows.tolist()


def message(file: str, **settings: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        ready(file, **settings)
    return str(error.value)


def test_the_shipped_tables_are_those_of_scikit_learn() -> None:
    for data, bunch in (
        (Diabetes(), datasets.load_diabetes(scaled=False)),
        (BreastCancer(), datasets.load_breast_cancer()),
    ):
        rows = data.load()["train"]
        np.testing.assert_allclose(rows.features, bunch.data)
        np.testing.assert_allclose(rows.targets.reshape(-1), bunch.target)
        data.setup()
        assert data.feature_names == list(bunch.feature_names) or data.feature_names[10] == "error of radius"
    diabetes = Diabetes()
    diabetes.setup()
    assert [len(part(diabetes, name)) for name in ("train", "val", "test")] == [282, 71, 89]


def test_a_table_is_the_same_from_every_format(tmp_path: Path) -> None:
    table = frame()[["a", "b", "y"]]
    np.savez(tmp_path / "x.npz", x=table[["a", "b"]].to_numpy(), y=table["y"].to_numpy())
    files = {suffix: write(tmp_path, table, f"x.{suffix}") for suffix in ("csv", "parquet")}
    read = [ready(file, target="y") for file in files.values()]
    arrays = ready(str(tmp_path / "x.npz"))
    for data in (*read, arrays):
        for name in ("train", "val", "test"):
            ours, expected = part(data, name).as_batch(), part(read[0], name).as_batch()
            assert torch.equal(ours.inputs, expected.inputs)
            assert torch.equal(ours.targets, expected.targets)
    assert read[0].fingerprint == read[1].fingerprint
    assert arrays.feature_names == ["x0", "x1"]


def test_features_and_numbers_are_standardized_by_the_training_rows(tmp_path: Path) -> None:
    table = frame()
    data = ready(write(tmp_path, table), target="y", features=["a", "b"])
    train, rows = part(data, "train"), members(data, "train")
    values = table[["a", "b", "y"]].to_numpy()
    expected = (values - values[rows].mean(0)) / values[rows].std(0)
    np.testing.assert_allclose(train.as_batch().inputs.numpy(), expected[rows, :2], rtol=1e-5, atol=1e-6)
    test, others = part(data, "test"), members(data, "test")
    np.testing.assert_allclose(test.as_batch().inputs.numpy(), expected[others, :2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(test.targets[:, 0].numpy(), expected[others, 2], rtol=1e-5, atol=1e-6)
    assert data.task_sizes == {
        "target_names": ["y"],
        "target_mean": [pytest.approx(values[rows, 2].mean())],
        "target_std": [pytest.approx(values[rows, 2].std())],
    }


def test_large_numbers_with_small_differences_keep_them(tmp_path: Path) -> None:
    table = frame()
    table["time"] = 1.7e9 + np.arange(40) * 0.01  # float32 has steps of 128 there
    inputs = part(ready(write(tmp_path, table), target="y", features=["time"]), "train").as_batch().inputs
    assert len(inputs.unique()) == len(inputs)


def test_columns_that_hold_no_numbers_are_left_out_and_named(tmp_path: Path) -> None:
    data = ready(write(tmp_path, frame()), target="y")
    assert data.feature_names == ["a", "b", "big_a", "big_b"]
    assert "columns that hold no numbers are left out: word" in data.caveats()


def test_classes_are_text_integers_or_booleans_in_their_order(tmp_path: Path) -> None:
    table = frame()
    for values, names in (
        (["red", "blue"], ["blue", "red"]),
        ([10, 9], ["9", "10"]),
        ([True, False], ["False", "True"]),
    ):
        table["y"] = values * 20
        data = ready(write(tmp_path, table), target="y", target_kind="class")
        assert data.names() == names
        for name in ("train", "val", "test"):
            expected = [names.index(str(values[row % 2])) for row in members(data, name)]
            assert part(data, name).targets.tolist() == expected
        assert part(data, "test").targets.bincount().tolist() == [4, 4]


def test_several_labels(tmp_path: Path) -> None:
    table = frame()
    data = ready(write(tmp_path, table), target=["big_a", "big_b"], target_kind="multilabel", features=["a", "b"])
    assert data.task_sizes == {"label_names": ["big_a", "big_b"]}
    rows = members(data, "train")
    assert part(data, "train").targets.tolist() == table[["big_a", "big_b"]].to_numpy()[rows].tolist()


def test_parts_are_files_a_column_or_held_out(tmp_path: Path) -> None:
    table = frame()
    file = write(tmp_path, table)
    held_out = ready(file, target="y")
    assert [len(part(held_out, name)) for name in ("train", "val", "test")] == [25, 7, 8]
    other = ready(file, target="y", split_seed=3)
    assert members(other, "test") == members(held_out, "test")
    assert members(other, "val") != members(held_out, "val")

    table["part"] = ["train"] * 20 + ["test"] * 12 + ["val"] * 8
    by_column = ready(write(tmp_path, table, "parts.csv"), target="y", split_column="part")
    files = {
        f"{name}_file": write(tmp_path, table[table["part"] == name].drop(columns="part"), f"{name}.csv")
        for name in ("val", "test")
    }
    by_file = ready(write(tmp_path, table[:20].drop(columns="part"), "train.csv"), target="y", **files)
    for name, size in (("train", 20), ("val", 8), ("test", 12)):
        ours, expected = part(by_column, name).as_batch(), part(by_file, name).as_batch()
        assert len(ours.targets) == size
        assert torch.equal(ours.inputs, expected.inputs)
        assert torch.equal(ours.targets, expected.targets)
    assert "validated on the given validation part, val_fraction is not used" in by_file.caveats()
    folds = ready(write(tmp_path, table, "parts.csv"), target="y", split_column="part", folds=4)
    assert "the 8 rows of the given validation part are not used" in folds.caveats()
    assert len(part(folds, "val")) == 5


def test_equal_rows_stay_on_one_side_and_shared_ones_are_counted(tmp_path: Path) -> None:
    table = frame()
    twice = pd.concat([table, table])
    data = ready(write(tmp_path, twice), target="y")
    assert not any("samples too" in note for note in data.caveats())
    file = write(tmp_path, table)
    copied = ready(file, target="y", test_file=write(tmp_path, table[:3], "test.csv"), val_fraction=0.1)
    assert any("of 3 test samples are" in note for note in copied.caveats())


@pytest.mark.parametrize(
    ("column", "value", "settings", "expected"),
    [
        ("a", "n/a", {}, "row 3: a is 'n/a'; it is no number; fix it, or leave the row out"),
        ("a", "", {}, "row 3: a is missing; fill it in, or leave the row out"),
        ("a", "nan", {}, "row 3: a is 'nan'; it is no number; fix it, or leave the row out"),
        ("a", "inf", {}, "row 3: a is inf; it is too large; fix it, or leave the row out"),
        ("a", "1e39", {}, "row 3: a is 1e+39; it is too large; fix it, or leave the row out"),
        ("y", "", {}, "row 3: y is missing; fill it in, or leave the row out"),
        ("y", "", {"target_kind": "class"}, "row 3: y is missing; fill it in, or leave the row out"),
        ("big_a", "2", {"target": ["big_a", "big_b"], "target_kind": "multilabel"}, "row 3: big_a is 2; a label is 0"),
        ("word", "dev", {"split_column": "word"}, "row 3: word is 'dev'; a split is train, val or test; fix it"),
    ],
)
def test_a_bad_value_is_named_with_its_row_and_column(
    tmp_path: Path, column: str, value: str, settings: dict[str, Any], expected: str
) -> None:
    table = frame()
    table["word"] = ["train", "test"] * 20
    file = Path(write(tmp_path, table))
    lines = file.read_text().splitlines()
    cells = lines[3].split(",")
    cells[list(table.columns).index(column)] = value
    file.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]))
    found = message(str(file), **{"target": "y", **settings})
    assert found.startswith(f"{file}, {expected}"), found
    assert "\n" not in found


def test_what_makes_no_data_is_refused(tmp_path: Path) -> None:
    table = frame()
    file = write(tmp_path, table)
    there = f"{file} has no such column; it has the columns a, b, word, y, big_a, big_b"
    assert message(file, target="z") == f"target=z: {there}"
    assert message(file, target="y", features=["a", "z"]) == f"features=z: {there}"
    assert message(file, target="y", split_column="z") == f"split_column=z: {there}"
    assert message(file) == f"target=null: name the column to predict; {file} has " + there.partition("it has ")[2]
    assert message(file, target="y", features=["a", "y"]) == "features: y is the target or the split; leave it out"
    assert "word is 'blue'; it is no number" in message(file, target="y", features=["word"])
    assert message(file, target="y", target_kind="class").startswith(f"{file}, row 1: y is ")
    assert "classes are in one column" in message(file, target=["big_a", "big_b"], target_kind="class")
    assert message(file, target="y", target_kind="real") == "target_kind=real: there are class, multilabel, number"
    assert "set val_file and test_file to null" in message(file, target="y", split_column="word", test_file=file)
    assert "val_fraction=1.5: both parts of 32 different samples" in message(file, target="y", val_fraction=1.5)
    assert "folds=50: there are only 32 different training samples" in message(file, target="y", folds=50)
    assert message(str(tmp_path / "none.csv")) == f"train_file={tmp_path}/none.csv: there is no such file"
    assert "a .csv, .parquet or .npz file is needed" in message("table.xlsx", target="y")

    assert message(write(tmp_path, table[:0], "empty.csv"), target="y").endswith("export it again, with its rows")
    table["word"] = ["test", "val"] * 20
    assert "no row of" in message(write(tmp_path, table, "parts.csv"), target="y", split_column="word")
    table["a"] = 3
    assert message(write(tmp_path, table, "constant.csv"), target="y") == (
        "the feature a has the same value in all 25 training rows; leave it out of the file, or of data.features"
    )
    assert "the target a has the same value" in message(str(tmp_path / "constant.csv"), target="a")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert "broken.parquet: it cannot be read" in message(str(tmp_path / "broken.parquet"), target="y")
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 2)))
    assert "there is no array y, but x" in message(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 2)), y=np.zeros(4))
    assert "x (3, 2) and y (4,) are not rows" in message(str(tmp_path / "x.npz"))


def test_classes_that_training_lacks_and_single_ones_are_refused(tmp_path: Path) -> None:
    table = frame()
    file = write(tmp_path, table)
    table.loc[4, "word"] = "green"
    test = write(tmp_path, table, "test.csv")
    assert message(file, target="word", target_kind="class", test_file=test) == (
        f"{test}, row 5: word is 'green'; no training row has this class; give some, or leave the row out"
    )
    table["word"] = "red"
    assert "one class, red" in message(write(tmp_path, table, "one.csv"), target="word", target_kind="class")


def test_another_value_is_another_fingerprint(tmp_path: Path) -> None:
    table = frame()
    first = ready(write(tmp_path, table), target="y").fingerprint
    table.loc[7, "a"] += 1e-9
    assert ready(write(tmp_path, table), target="y").fingerprint != first
