"""Write the predictions of a run's weights to a CSV file: for a folder of images, a table, or a text.

python scripts/predict.py RUN images/                        each image's class, and the probability of each class
python scripts/predict.py RUN rows.csv --out predicted.csv   each row's class or values, in the unit of the target
python scripts/predict.py RUN prompts.txt --num-tokens 100   each line's loss and perplexity, and a continuation

The inputs must be of the kind that RUN was trained on. Images are resized to the training images.

"""

from __future__ import annotations

import argparse
from pathlib import Path

from ablab.lab.config.errors import readable_errors
from ablab.lab.loading import loading
from ablab.status import only_on_a_terminal


def positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: a number of tokens, at least 1, is needed")
    return int(word)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("source", type=Path, help="a folder of images or one image, a .csv or .parquet file, or a text")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions.csv"),
        help="a file that does not exist yet (default: predictions.csv)",
    )
    parser.add_argument("--weights", choices=("best", "last"), default="best")
    parser.add_argument("--num-tokens", type=positive, default=50, help="length of a line's continuation (default: 50)")
    parser.add_argument("--trust", action="store_true", help="build any class that its config names: docs/runs.md")
    options = parser.parse_args()
    with loading(announce=True):
        from ablab.lab.predict import predict

    number = predict(
        options.run,
        options.source,
        options.out,
        weights=options.weights,
        num_tokens=options.num_tokens,
        trust=options.trust,
    )
    print(f"{options.out}: {number:,} rows")


if __name__ == "__main__":
    with readable_errors(), only_on_a_terminal():
        main()
