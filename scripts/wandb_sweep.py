"""Print a W&B sweep of an ablation: the same grid, for W&B agents to run.

    python scripts/wandb_sweep.py norm_batch_size > sweep.yaml
    wandb sweep sweep.yaml        # prints the command that starts an agent, on any number of machines
    python train.py ablation=norm_batch_size logger=wandb    # all runs are done: writes the report

Overrides after the name apply to the ablation: norm=batchnorm,frn seed=0,1.

"""

from __future__ import annotations

import argparse
import sys

import yaml
from hydra import compose, initialize_config_dir

from ablab.lab.ablation.overrides import parse_ablation
from ablab.lab.config.errors import readable_errors
from ablab.lab.config.yaml_files import CONF


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", help="the name of the ablation")
    parser.add_argument("words", nargs="*", help="overrides of factors and seeds")
    options = parser.parse_args()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"ablation={options.ablation}"])
    ablation, common = parse_ablation([f"ablation={options.ablation}", *options.words], cfg)
    content = {
        "name": ablation.name,
        "method": "grid",
        "program": "train.py",
        # each run is the ablation restricted to one cell and one seed, which has no baseline
        "command": [
            "${env}",
            "python",
            "${program}",
            *common,
            "logger=wandb",
            "ablation.baseline=null",
            "${args_no_hyphens}",
        ],
        "parameters": {
            **{factor: {"values": levels} for factor, levels in ablation.factors.items()},
            "seed": {"values": ablation.seeds},
        },
    }
    yaml.safe_dump(content, sys.stdout, sort_keys=False)


if __name__ == "__main__":
    with readable_errors():
        main()
