"""Tokens per second of a causal transformer: a run, a hand-written loop, and torch's encoder layers in that loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from benchmarks.measuring import Ratio, measure
from benchmarks.step import time_hand_written, time_run, training_config

# small on a CPU; large enough to saturate a GPU
SIZES = {
    "cpu": {"embed_dim": 128, "num_layers": 4, "num_heads": 4, "context_length": 128, "batch_size": 32, "steps": 10},
    "cuda": {"embed_dim": 768, "num_layers": 12, "num_heads": 12, "context_length": 512, "batch_size": 32, "steps": 30},
}
VOCABULARY = 256


def lm(rounds: int, device: torch.device) -> Iterator[Ratio]:
    """Measure steps of a run against a loop with the same network, and that network against torch's layers."""
    size = SIZES[device.type]
    steps, length, batch = size["steps"], size["context_length"], size["batch_size"]
    cfg = training_config(
        device,
        steps,
        *("model=transformer", "data=synthetic_text", f"data.vocab_size={VOCABULARY}"),
        *(f"data.{name}={size[name]}" for name in ("context_length", "batch_size")),
        *(f"model.{name}={size[name]}" for name in ("embed_dim", "num_layers", "num_heads")),
        *(("trainer.precision=bf16-mixed",) if device.type == "cuda" else ()),
    )
    place = f"{size['num_layers']} blocks of {size['embed_dim']}, {batch} x {length}"
    ours, hand = partial(time_run, cfg, steps), partial(time_hand_written, cfg, steps)
    for what, step, peer, peers_step in (
        ("a run's step", ours, "by hand", hand),
        ("the transformer", hand, "nn.TransformerEncoder", partial(time_torch_layers, cfg, steps)),
    ):
        ratio = measure(place, what, step, peer, peers_step, rounds, warmup=1)
        yield replace(ratio, what=f"{what}, {1000 * batch * length / ratio.ours:,.0f} tokens a second")


def time_torch_layers(cfg: DictConfig, steps: int) -> float:
    """Return the seconds per step of torch's encoder layers with a causal mask, in the hand-written loop."""
    return time_hand_written(cfg, steps, TorchTransformer(cfg))


class TorchTransformer(nn.Module):
    """A typical model of a user: an embedding, positions, `nn.TransformerEncoder`, a head."""

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        dim, length = cfg.model.embed_dim, cfg.data.context_length
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(length, dim)
        layer = nn.TransformerEncoderLayer(
            dim, cfg.model.num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, cfg.model.num_layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
        self.register_buffer("numbers", torch.arange(length))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(self.numbers)
        return self.head(self.blocks(x, self.mask, is_causal=True))
