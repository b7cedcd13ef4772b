"""Upload offline runs to Weights & Biases, from the login node of a cluster or after going online.

    python scripts/sync.py runs/norm_batch_size    all runs of an ablation
    python scripts/sync.py runs                    all runs

Uploaded runs are not uploaded again, and runs in progress are skipped. Exit code 1: some uploads failed; repeat the
command to upload the rest.

"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ablab.disk import is_locked
from ablab.errors import ConfigError
from ablab.lab.config.errors import readable_errors
from ablab.lab.run.folder import LOCK, relpath


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs, or folders above them")
    parser.add_argument("--patience", type=float, default=600, help="maximum seconds per run (default: 600)")
    options = parser.parse_args()
    folders = options.folders
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder")
    runs = sorted({file.parents[2] for folder in folders for file in folder.rglob("wandb/offline-run-*/*.wandb")})
    if not runs:
        raise ConfigError(f"{', '.join(map(str, folders))}: no run is there that Weights & Biases kept offline")
    sent, there, failed = 0, 0, 0
    for run in runs:
        if is_locked(run / LOCK):
            print(f"{relpath(run)}: still going on, left for later")
        elif is_sent(run):
            there += 1
        else:
            said = upload(run / "wandb", options.patience)
            if is_sent(run):
                sent += 1
                print(f"{relpath(run)}: sent")
            else:
                failed += 1
                print(f"{relpath(run)}: could not be sent: {said}", file=sys.stderr)
    print(f"{sent} sent, {there} had been before, {failed} could not be")
    return 1 if failed else 0


def is_sent(run: Path) -> bool:
    """Return whether W&B has marked all offline files of a run as uploaded."""
    return all(Path(f"{file}.synced").exists() for file in run.glob("wandb/offline-run-*/*.wandb"))


def upload(folder: Path, patience: float) -> str:
    """Run `wandb sync` and return its last line; its exit code is always 0, and it retries until the timeout."""
    command = [str(Path(sys.executable).with_name("wandb")), "sync", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience, encoding="utf-8")
    except subprocess.TimeoutExpired:
        return f"no answer within {patience:g} s"
    return [*(done.stdout + done.stderr).strip().splitlines(), "nothing"][-2:][0]


if __name__ == "__main__":
    with readable_errors():
        sys.exit(main())
