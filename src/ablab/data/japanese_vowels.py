"""Japanese Vowels data set: speaker classification from sequences of 7 to 29 steps, shipped with aeon."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ablab.data.timeseries import TimeSeries


class JapaneseVowels(TimeSeries):
    """Utterances of /ae/ by nine speakers, 12 LPC cepstrum coefficients per step; 270 to train, 370 to test.

    Args:
        settings: see `TimeSeries`, `LabelledData` and `DataModule`.

    Shape:
        inputs `(N, 29, 12)`, targets `(N)`, valid `(N, 29)`

    Raises:
        ValueError: aeon is not installed.

    References:
        Kudo et al. 1999, https://doi.org/10.1016/S0167-8655(99)00077-X
    """

    def __init__(self, **settings: Any) -> None:
        found = importlib.util.find_spec("aeon")  # importing it takes seconds and is not needed
        if found is None or found.origin is None:
            raise ValueError("its utterances come with a package: pip install -e '.[data]'")
        folder = Path(found.origin).parent / "datasets" / "data" / "JapaneseVowels"
        train, test = (str(folder / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
        super().__init__(train_file=train, test_file=test, **settings)
