"""Breast cancer (Wisconsin) data set: tumour classification from 30 features, shipped with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ablab.data.digits import shipped_file
from ablab.data.vectors import Part, Rows, Vectors


class BreastCancer(Vectors):
    """Malignant and benign tumours, by features of cell nuclei: 364 training, 91 validation and 114 test rows.

    Args:
        settings: see `Vectors` and `DataModule`; the test rows are fixed.

    Shape:
        inputs `(N, 30)`, targets `(N)`

    References:
        Street, Wolberg & Mangasarian 1993, https://archive.ics.uci.edu/dataset/17
    """

    target_kind = "class"

    def load(self) -> Mapping[Part, Rows]:
        measured = ["radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity"]
        measured += ["concave points", "symmetry", "fractal dimension"]
        self.feature_names = [f"{which} {name}" for which in ("mean", "error of", "worst") for name in measured]
        self.target_names = ["malignant", "benign"]
        rows = np.loadtxt(shipped_file("breast_cancer.csv"), delimiter=",", skiprows=1)
        return {"train": Rows(rows[:, :-1], rows[:, -1].astype(np.int64))}
