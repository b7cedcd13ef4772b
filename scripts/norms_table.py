"""Write the table of docs/norms.md, from the properties of the norms and the models that they fit.

python scripts/norms_table.py            print it
python scripts/norms_table.py --write    write it to docs/norms.md

"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from ablab.lab.config.build import build
from ablab.models.mlp import MLP
from ablab.models.resnet import ResNet
from ablab.models.rnn import RNN
from ablab.models.transformer import Transformer
from ablab.norms import Norm, collect_refusals, find_norm_problems

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "norms.md"
BEGIN = "<!-- written by scripts/norms_table.py -->"
END = "<!-- end -->"
COLUMNS = (
    "`norm=`",
    "image: statistics",
    "sequence: statistics",
    "batch",
    "train = eval",
    "state",
    "at least",
    "masks",
    "ResNet",
    "encoder",
    "decoder",
    "RNN",
    "MLP",
)


def table() -> str:
    """Return the table in Markdown, with a row for each YAML of conf/norm."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for file in sorted((ROOT / "conf" / "norm").glob("*.yaml")):
            rows.append(row(file.stem, build(compose(f"norm/{file.stem}").norm)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(name: str, norm: Norm) -> tuple[str, ...]:
    return (
        f"`{name}`",
        statistics(norm, "image"),
        statistics(norm, "sequence"),
        yes_or_no(norm.sees_batch),
        yes_or_no(norm.train_equals_eval),
        yes_or_no(norm.has_running_state),
        "2 values" if any(s.source != "stored" for s in norm.statistics("image")) else "1 value",
        yes_or_no(norm.supports_masks),
        *(yes_or_no(fits(norm, *place)) for place in example_models()),
    )


def statistics(norm: Norm, layout: str) -> str:
    activations = [str(statistic) for statistic in norm.statistics(layout)]  # type: ignore[arg-type]
    weights = [norm.weight.title] if norm.reparametrizes else []
    return "; ".join(activations + weights) or "none"


def example_models() -> list[tuple[type[nn.Module], dict[str, int], torch.Tensor]]:
    """Return the architectures, each with arguments and an input batch."""
    vectors, tokens = torch.zeros(4, 8, 8), torch.zeros(4, 8, dtype=torch.long)
    sequence = {"in_features": 8, "num_classes": 10, "context_length": 8}
    return [
        (ResNet, {"in_channels": 1, "num_classes": 10, "depth": 8}, torch.zeros(4, 1, 8, 8)),
        (Transformer, sequence, vectors),
        (Transformer, {"vocab_size": 10, "context_length": 8}, tokens),
        (RNN, sequence, vectors),
        (MLP, {"in_features": 8, "num_outputs": 10}, torch.zeros(4, 8)),
    ]


def fits(norm: Norm, architecture: type[nn.Module], sizes: dict[str, int], inputs: torch.Tensor) -> bool:
    with torch.device("meta"), collect_refusals():
        model = architecture(norm=norm, **sizes)
    return not find_norm_problems(model, norm, lambda: model(inputs.to("meta")))


def yes_or_no(value: bool) -> str:
    return "yes" if value else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/norms.md")
    if not parser.parse_args().write:
        print(table())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
