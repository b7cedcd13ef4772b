"""Run a recorded run again, from its folder alone, and compare: equal to the bit, or the first step where they part.

    python scripts/reproduce.py RUN                    says what of code, data and environment has changed, then trains
    python scripts/reproduce.py RUN optimizer.lr=0.05  with a deliberate change

The new run goes into `reproductions` beside the other, or into output_dir=FOLDER. A run that was stopped, killed or is
going on is compared as far as it goes; one that diverged has to diverge again. Exit code 0: equal; 4: not equal; 2: no
such run, or nothing in it to compare.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ablab.config.build import blame, build
from ablab.config.errors import ConfigError, readable_errors
from ablab.config.schema import check
from ablab.dry_run import CONF
from ablab.runs import provenance, signals
from ablab.runs.compare import OF_ITSELF, check_comparable, compare, report
from ablab.runs.folder import config_of, read_environment, read_record
from ablab.runs.outcome import Diverged
from ablab.train import train

NOT_EQUAL = 4

say = rank_zero_only(print)


def config_again(folder: Path, changes: list[str]) -> DictConfig:
    """The config of the run, to be run elsewhere, without loggers, and with what is changed on purpose.

    Raises:
        ConfigError: the folder is no run's, or it has no such key to change.
    """
    cfg = config_of(folder)
    cfg.logger = {}
    cfg.output_dir = str(folder.absolute().parent / "reproductions")
    cfg.resume = cfg.folder = cfg.ablation = None
    for change in changes:
        key, equals, value = change.partition("=")
        if not key or not equals or OmegaConf.select(cfg, key, default=KeyError) is KeyError:
            raise ConfigError(f"{change}: key=value is needed, of a key in {folder / 'config.yaml'}")
        if key in ("resume", "folder"):
            raise ConfigError(f"{change}: a run is made again from its beginning; leave it out")
        try:
            OmegaConf.update(cfg, key, OmegaConf.create(f"value: {value}").value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{change}: the value cannot be read; quote what has signs in it") from error
    return cfg


def changes_since(folder: Path, cfg: DictConfig) -> list[str]:
    """What is not as it was when the run was made: code, data, environment."""
    record, changes = read_record(folder), provenance.environment_changes(read_environment(folder))
    then, now = record["identity"]["code"], provenance.code_hash()[: len(record["identity"]["code"])]
    if then != now:
        patch = f" with {folder / 'changes.patch'}" if (folder / "changes.patch").exists() else ""
        commits = record["git_commit"], provenance.git_commit()
        changes.insert(0, f"the code: {then} (commit {commits[0]}{patch}) then, {now} (commit {commits[1]}) now")
    data = build(cfg.data)
    with blame("data"):
        data.setup("fit")
    if data.fingerprint != record["data"]["fingerprint"]:
        changes.append(f"the data: {record['data']['fingerprint'][:12]} then, {data.fingerprint[:12]} now")
    return changes


def take_threads(folder: Path) -> None:
    """Compute with as many threads as the run did: another number rounds otherwise."""
    then, now = read_environment(folder)["threads"]["torch"], torch.get_num_threads()
    if then != now:
        say(f"threads: {then}, as in the run, instead of {now}")
        torch.set_num_threads(then)


def run_again(cfg: DictConfig) -> Path:
    """Train; the new run's folder, also where the run diverges."""
    parent = Path(cfg.output_dir)
    others = set(parent.glob("*/run.json"))
    try:
        return train(cfg).folder
    except Diverged as error:
        say(f"diverged: {error}")
        if rank_zero_only.rank != 0:
            return parent
        new = set(parent.glob("*/run.json")) - others
        [folder] = [file.parent for file in new if read_record(file.parent)["pid"] == os.getpid()]
        return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="to be another than in the run")
    options = parser.parse_args()
    check_comparable(options.run)
    cfg = config_again(options.run, options.changes)
    check(cfg, root=CONF / "train.yaml")
    take_threads(options.run)
    for line in [*changes_since(options.run, cfg), *(f"{change}, on purpose" for change in options.changes)]:
        say(f"not as it was: {line}")
    status = read_record(options.run)["status"]
    if status not in OF_ITSELF:
        say(f"the run is {status}: it is compared as far as it goes")

    again = run_again(cfg)
    if rank_zero_only.rank != 0:
        return 0
    found = compare(options.run, again)
    print(report(found))
    return 0 if found.equal else NOT_EQUAL


if __name__ == "__main__":
    signals.install()
    with readable_errors():
        sys.exit(main())
