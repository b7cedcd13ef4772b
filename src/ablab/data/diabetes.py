"""Diabetes data set: regression from ten features, shipped with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ablab.data.digits import shipped_file
from ablab.data.vectors import Part, Rows, Vectors


class Diabetes(Vectors):
    """Disease progression after one year, from 25 to 346: 282 training, 71 validation and 89 test rows.

    Args:
        settings: see `Vectors` and `DataModule`; the test rows are fixed.

    Shape:
        inputs `(N, 10)`, targets `(N, 1)`

    References:
        Efron et al. 2004, https://www4.stat.ncsu.edu/~boos/var.select/diabetes.html
    """

    target_kind = "number"

    def load(self) -> Mapping[Part, Rows]:
        self.feature_names = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]
        self.target_names = ["progression"]
        features = np.loadtxt(shipped_file("diabetes_data_raw.csv.gz"))
        targets = np.loadtxt(shipped_file("diabetes_target.csv.gz"))
        return {"train": Rows(features, targets[:, None])}
