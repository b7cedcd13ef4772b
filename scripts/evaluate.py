"""Evaluate the weights of a run on any split or shift, from its folder alone; the folder does not change.

python scripts/evaluate.py RUN                                      the test split, as in the run's table
python scripts/evaluate.py RUN --shift contrast --severity 5        with shifted inputs (conf/data/shift)
python scripts/evaluate.py RUN --split val --weights last           validation data, the newest weights

"""

from __future__ import annotations

import argparse
from pathlib import Path

from ablab.lab.config.errors import readable_errors
from ablab.lab.loading import loading
from ablab.rank import rank
from ablab.status import only_on_a_terminal


def show(rows: dict[str, str]) -> None:
    if rank() == 0:
        width = max(map(len, rows))
        print(*(f"{name:<{width}}  {text}" for name, text in rows.items()), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--shift", help="a choice of conf/data/shift; none removes the run's own")
    parser.add_argument("--severity", type=int, help="severity of the shift, from 1 to 5")
    parser.add_argument("--weights", choices=("best", "last"), default="best")
    parser.add_argument("--trust", action="store_true", help="build any class that its config names: docs/runs.md")
    options = parser.parse_args()
    with loading(announce=True):
        from ablab.lab.evaluate import describe_shift, evaluate, scoring_config

    found = evaluate(
        options.run,
        split=options.split,
        shift=options.shift,
        severity=options.severity,
        weights=options.weights,
        trust=options.trust,
    )
    cfg = scoring_config(options.run, shift=options.shift, severity=options.severity)
    limit = cfg.trainer.limit_test_batches
    whole = options.split != "test" or limit is None or (isinstance(limit, float) and limit == 1)  # 1 is one batch
    show(
        {
            "split": options.split if whole else f"{options.split}, as in the run (trainer.limit_test_batches={limit})",
            "shift": describe_shift(cfg),
            **{name.removeprefix("test/"): f"{value:.4f}" for name, value in found.items()},
        }
    )


if __name__ == "__main__":
    with readable_errors(), only_on_a_terminal():
        main()
