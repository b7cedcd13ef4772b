"""Helpers shared by the sequence models."""

from __future__ import annotations

from torch import Tensor


def num_outputs(in_features: int | None, vocab_size: int | None, num_classes: int | None) -> int:
    """Return the number of logits of a sequence model: `num_classes`, or `vocab_size` for language modelling.

    Raises:
        ValueError: both or none of `in_features` and `vocab_size` are given, or there is nothing to predict.
    """
    if (in_features is None) == (vocab_size is None):
        raise ValueError(
            f"in_features={in_features}, vocab_size={vocab_size}: give one of them, the steps' vectors or their tokens"
        )
    outputs = vocab_size if num_classes is None else num_classes
    if outputs is None:
        raise ValueError("num_classes=None: it is needed without vocab_size, as there is no next token to predict")
    return outputs


def zero_padding(inputs: Tensor, valid: Tensor | None) -> Tensor:
    """Replace the padding of vectors `(N, L, features)`, which may be NaN, by zeros; leave tokens unchanged."""
    if valid is None or not inputs.is_floating_point():
        return inputs
    return inputs.masked_fill(~valid[..., None], 0.0)
