"""Train a model: python train.py norm=groupnorm data.batch_size=8 (python train.py --help shows what there is)."""

import gc
import sys

from ablab.lab.run import signals

if __name__ == "__main__":
    signals.install()  # before all that takes time to import: a signal has a meaning from here on
    gc.disable()  # until the libraries are loaded, see ablab.lab.loading

from pathlib import Path

import hydra
from omegaconf import DictConfig

from ablab.lab.config import help
from ablab.lab.config.errors import readable_errors
from ablab.lab.config.schema import check_config
from ablab.lab.config.yaml_files import check_conf
from ablab.lab.loading import loading
from ablab.lab.run.resume import hydra_argv, is_finished, resume_config

CONF = Path(__file__).parent / "conf"
TYPED = sys.argv


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@readable_errors()  # within Hydra, which would put a line of its own before the message
def main(cfg: DictConfig) -> None:
    sys.argv = TYPED  # Hydra has read its own, see below
    cfg = resume_config(cfg)
    check_config(cfg, root=CONF / "train.yaml")
    if is_finished(cfg):
        return
    with loading(announce=not cfg.quiet):
        from ablab.lab.train import train  # only now: torch and lightning take seconds to load, a typo should not

    train(cfg)


if __name__ == "__main__":
    help.register(CONF)
    with readable_errors():
        check_conf()
        sys.argv = hydra_argv(TYPED)
        main()
