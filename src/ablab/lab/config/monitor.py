"""Infer from a metric's name whether higher or lower is better."""

from __future__ import annotations

from omegaconf import OmegaConf

LOWER_IS_BETTER = ("loss", "err", "mae", "mse", "nll", "perplexity", "ppl", "fid", "wer", "cer", "mape", "divergence")


def mode_of(metric: str | None) -> str:
    """Return "min" for losses and errors, "max" for other metrics."""
    return "min" if any(word in str(metric).lower() for word in LOWER_IS_BETTER) else "max"


OmegaConf.register_new_resolver("mode_of", mode_of, replace=True)
