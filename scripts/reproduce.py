"""Repeat a recorded run from its folder alone, and compare: equal to the bit, or the first step that differs.

    python scripts/reproduce.py RUN                    list changes in code, data and environment, then train
    python scripts/reproduce.py RUN optimizer.lr=0.05  with a deliberate change

The new run goes into `reproductions` beside the other, or into output_dir=FOLDER. A run that was stopped or killed, or
is still running, is compared up to its last row; one that diverged must diverge again. Exit code 0: equal; 4: not
equal; 2: not a run, or nothing to compare.

"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hydra import initialize_config_dir
from omegaconf import DictConfig

from ablab.errors import ConfigError, Diverged
from ablab.lab.config.errors import readable_errors
from ablab.lab.config.schema import check_config, is_guest
from ablab.lab.config.yaml_files import CONF
from ablab.lab.loading import loading
from ablab.lab.run import signals
from ablab.lab.run.folder import read_config, read_environment, read_record
from ablab.lab.run.identity import plain, result_differences
from ablab.lab.run.resume import compose_changes
from ablab.rank import rank
from ablab.status import only_on_a_terminal

NOT_EQUAL = 4


def print_once(text: str) -> None:
    if rank() == 0:
        print(text)


def reproduction_config(folder: Path, changes: list[str], *, trust: bool = False) -> DictConfig:
    """Return the config of the run for a new folder, without loggers and with deliberate changes.

    Raises:
        ConfigError: the folder is not a run, or a changed key does not exist.
    """
    for change in changes:
        key, equals, _ = change.partition("=")
        if not key or not equals:
            raise ConfigError(f"{change}: key=value is needed, as on the command line")
        if key == "trust":
            raise ConfigError(f"{change}: this is no change of the run; say --trust")
        if key in ("resume", "folder"):
            raise ConfigError(f"{change}: a run is made again from its beginning; leave it out")
    cfg, places = read_config(folder), [change for change in changes if change.startswith("output_dir=")]
    if len(places) < len(changes):
        with initialize_config_dir(str(CONF), version_base="1.3"):  # dependent values change as well
            cfg = compose_changes(folder, cfg, changes, trust=trust)
    cfg.logger = {}
    beside = f"output_dir={folder.absolute().parent / 'reproductions'}"
    cfg.output_dir = [beside, *places][-1].partition("=")[2]
    cfg.resume = cfg.folder = cfg.ablation = None
    return cfg


def train_again(cfg: DictConfig) -> Path:
    """Train, and return the new run's folder, even if the run diverges."""
    from ablab.lab.train import train

    parent = Path(cfg.output_dir)
    others = set(parent.glob("*/run.json"))
    try:
        return train(cfg).folder
    except Diverged as error:
        print_once(f"diverged: {error}")
        if rank() != 0:
            return parent
        new = set(parent.glob("*/run.json")) - others
        [folder] = [file.parent for file in new if read_record(file.parent)["pid"] == os.getpid()]
        return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="deliberate changes of the config")
    parser.add_argument("--trust", action="store_true", help="build any class that its config names: docs/runs.md")
    options = parser.parse_args()
    with loading(announce=True):
        from ablab.lab.config.trust import check_targets
        from ablab.lab.evaluate import match_threads
        from ablab.lab.run import provenance
        from ablab.lab.run.compare import SELF_ENDED, check_comparable, compare, format_comparison
        from ablab.lab.train import build_data

    check_comparable(options.run)
    cfg = reproduction_config(options.run, options.changes, trust=options.trust)
    cfg.trust = options.trust
    check_config(cfg, root=CONF / "train.yaml")
    check_targets(cfg)
    record, environment = read_record(options.run), read_environment(options.run)
    match_threads(environment)
    changes = provenance.changes_since(record, environment, plain(cfg))
    then = record["data"]["fingerprint"]
    now = then if is_guest(cfg) else build_data(cfg).fingerprint  # external data are only read by the run itself
    changes += [f"the data: {then[:12]} then, {now[:12]} now"] if then != now else []
    changes += [
        f"{key}: {a} then, {b} now" for key, a, b in result_differences(plain(read_config(options.run)), plain(cfg))
    ]
    for line in changes:
        print_once(f"not as it was: {line}")
    status = record["status"]
    if status not in SELF_ENDED:
        print_once(f"the run is {status}: it is compared as far as it goes")

    again = train_again(cfg)
    if rank() != 0:
        return 0
    found = compare(options.run, again)
    print(format_comparison(found))
    return 0 if found.equal else NOT_EQUAL


if __name__ == "__main__":
    signals.install()
    with readable_errors(), only_on_a_terminal():
        sys.exit(main())
