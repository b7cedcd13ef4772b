"""Files in the .ts format: read as another library reads them, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ablab.data.japanese_vowels import JapaneseVowels
from ablab.data.timeseries import TimeSeries, read_ts

HEADER = "@problemName x\n@timeStamps false\n@univariate false\n@classLabel true a b\n@data\n"


@pytest.mark.parametrize("name", ["JapaneseVowels", "BasicMotions", "GunPoint", "ItalyPowerDemand"])
@pytest.mark.filterwarnings("ignore")  # aeon's own
def test_series_are_read_as_aeon_reads_them(name: str) -> None:
    import aeon
    from aeon.datasets import load_from_ts_file

    path = Path(aeon.__file__).parent / "datasets" / "data" / name / f"{name}_TRAIN.ts"
    series, labels = load_from_ts_file(str(path), return_meta_data=False)
    found = read_ts("train_file", path)
    assert [label.lower() for label in found.labels] == labels.tolist()
    assert len(found.series) == len(series)
    for ours, theirs in zip(found.series, series, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs).T.float(), rtol=1e-6, atol=1e-6)


def test_japanese_vowels_are_the_published_ones() -> None:
    data = JapaneseVowels(folds=10)
    data.setup()
    assert data.splits is not None
    assert len(data.splits.train) + len(data.splits.val) == 270
    assert len(data.splits.test) == 370
    assert data.model_sizes == {"in_features": 12, "context_length": 29, "num_classes": 9}
    lengths = data.splits.test[range(370)].valid.sum(1)  # type: ignore[union-attr]
    assert (int(lengths.min()), int(lengths.max())) == (7, 29)


def write(folder: Path, text: str, name: str = "x_TRAIN.ts") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_series_of_any_length_are_padded_and_marked(tmp_path: Path) -> None:
    rows = "".join(f"1,2,3:4,5,{i}:a\n6:{i}:b\n" for i in range(10))
    train, test = write(tmp_path, HEADER + rows), write(tmp_path, HEADER + "1,2,3,4:5,6,7,8:b\n", "x_TEST.ts")
    data = TimeSeries(train_file=str(train), test_file=str(test), val_fraction=0.2, batch_size=4)
    data.setup()
    assert data.splits is not None
    assert data.model_sizes == {"in_features": 2, "context_length": 4, "num_classes": 2}
    batch = data.splits.test[[0]]
    assert batch.inputs[0].tolist() == [[1, 5], [2, 6], [3, 7], [4, 8]]
    train_batch = data.splits.train[range(len(data.splits.train))]
    assert sorted(set(train_batch.valid.sum(1).tolist())) == [1, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "there is no series in it; is it a .ts file, and whole?"),
        (HEADER + "1,2:3,4:a\n1,2:3:a\n", r"line 7: its dimensions have different lengths \(2, 1\)"),
        (HEADER + "1,2:3,4:a\n1,2:a\n", "line 7: it has 1 dimensions, and the first series has 2"),
        (HEADER + "1,2:3,?:a\n", r"line 6: a value is missing \(\?\); fill it in, or leave the series out"),
        (HEADER + "1,2:3,nan:a\n", r"line 6: a value is missing \(NaN\)"),
        (HEADER + "1,2:3,1e39:a\n", "line 6: 1e39 is too large; fix it, or leave the series out"),
        (HEADER + "1,2:3,x:a\n", "line 6: 'x' is no number"),
        (HEADER + "1,2:3,4:c\n", "line 6: its label 'c' is none of a, b"),
        (HEADER + "1,2,3\n", "line 6: a series and a label are needed, with a colon between them; is the file whole"),
        (HEADER.replace("@timeStamps false", "@timeStamps true"), "line 2: series with time stamps are not supported"),
        (HEADER.replace("@classLabel true a b", "@classLabel false"), "line 4: its series have no class labels"),
    ],
)
def test_what_is_no_series_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as raised:
        TimeSeries(train_file=str(path), test_file=str(path)).setup()
    assert str(path) in str(raised.value)


def test_missing_files_and_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    train = write(tmp_path, HEADER + "1,2:3,4:a\n")
    with pytest.raises(ValueError, match=r"test_file=.*y_TEST.ts: there is no such file"):
        TimeSeries(train_file=str(train), test_file=str(tmp_path / "y_TEST.ts")).setup()
    other = write(tmp_path, HEADER + "1,2:a\n", "x_TEST.ts")
    with pytest.raises(ValueError, match=r"test_file=.*its series have 1 dimensions, and those of .* have 2"):
        TimeSeries(train_file=str(train), test_file=str(other)).setup()


def test_the_same_series_for_training_and_testing_are_refused(tmp_path: Path) -> None:
    rows = "1,2:3,4:a\n5,6:7,8:b\n" * 5
    train = write(tmp_path, HEADER + rows)
    other = write(tmp_path, HEADER + rows, "x_TEST.ts")
    for test in (train, other):
        with pytest.raises(ValueError, match=r"it has the same content as train_file=.*x_TRAIN.ts; give"):
            TimeSeries(train_file=str(train), test_file=str(test)).setup()


def test_files_that_look_swapped_are_mentioned(tmp_path: Path) -> None:
    rows = "".join(f"1,2:3,{i}:a\n5,6:7,{i}:b\n" for i in range(20))
    train, test = write(tmp_path, HEADER + rows), write(tmp_path, HEADER + rows + rows, "x_TEST.ts")
    swapped = TimeSeries(train_file=str(test), test_file=str(train), batch_size=4)
    note = "trained on x_TEST.ts and tested on x_TRAIN.ts: are they swapped?"
    assert note in swapped.caveats()
    assert note not in TimeSeries(train_file=str(train), test_file=str(test), batch_size=4).caveats()


def test_labels_that_are_missing_are_refused_where_no_classes_are_declared(tmp_path: Path) -> None:
    header = HEADER.replace("@classLabel true a b\n", "")
    for label in ("?", "NaN", " ", ""):
        path = write(tmp_path, header + f"1,2:3,4:a\n1,2:3,4:{label}\n")
        with pytest.raises(ValueError, match=r"line 6: (its label is missing|a series and a label are needed)"):
            read_ts("train_file", path)


def test_a_byte_order_mark_does_not_hide_the_first_line(tmp_path: Path) -> None:
    text = "@classLabel true b a\n@data\n1,2:3,4:a\n"
    (tmp_path / "x.ts").write_text(text, encoding="utf-8-sig")
    assert read_ts("train_file", tmp_path / "x.ts").class_names == ["b", "a"]


def test_classes_are_matched_by_name_whatever_order_each_file_declares(tmp_path: Path) -> None:
    rows = "".join(f"1,2:3,{i}:a\n5,6:7,{i}:b\n" for i in range(20))
    train = write(tmp_path, HEADER + rows)
    test = write(tmp_path, HEADER.replace("true a b", "true b a") + "1,2:3,4:a\n", "x_TEST.ts")
    data = TimeSeries(train_file=str(train), test_file=str(test), batch_size=4)
    data.setup()
    assert data.splits is not None
    assert data.splits.test[[0]].targets.tolist() == [data.class_names.index("a")]
