"""Write the report of an ablation again from its folder alone: finished, unfinished, or copied from elsewhere.

    python scripts/report.py runs/norm_batch_size
    python scripts/report.py runs/norm_batch_size --baseline data.batch_size=32      compare with other cells
    python scripts/report.py runs/norm_batch_size --mix-code      combine runs of different code versions
    python scripts/report.py runs/norm_batch_size --wandb ablab   also log it to this project of Weights & Biases

Exit code 2: the folder is no ablation, none of its runs has finished, or they were made by different code.

"""

from __future__ import annotations

import argparse
from pathlib import Path

from ablab.lab.config.errors import readable_errors
from ablab.lab.loading import loading
from ablab.status import only_on_a_terminal, status_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the ablation's folder")
    parser.add_argument(
        "--baseline", metavar="FACTOR=LEVEL", nargs="+", help="compare with these levels instead of the ablation's own"
    )
    parser.add_argument("--mix-code", action="store_true", help="combine runs of different code versions")
    parser.add_argument("--wandb", metavar="PROJECT", help="log tables and an artifact; offline without a login")
    options = parser.parse_args()
    with loading(announce=True):
        from pandas import read_csv

        from ablab.lab.ablation.report import FOLDER, print_report, write_report
        from ablab.lab.ablation.results import read_results

    baseline = dict(word.partition("=")[::2] for word in options.baseline) if options.baseline else None
    results = read_results(options.folder, mix_code=options.mix_code, baseline=baseline)
    with status_lines("writing the report"):
        report = write_report(results, options.folder)
    print_report(report, options.folder)
    if options.wandb is not None:
        from ablab.lab.loggers.wandb import log_report

        place = options.folder / FOLDER
        files = [place / f"{name}.csv" for name in ("runs", "cells", "comparisons")]
        tables = {
            file.stem: read_csv(file) for file in files if file.stat().st_size
        }  # an empty file means no comparisons
        print(f"W&B: {log_report(place, report.title, project=options.wandb, tables=tables)}")


if __name__ == "__main__":
    with readable_errors(), only_on_a_terminal():
        main()
