"""What the models of sequences have in common."""

from __future__ import annotations

from torch import Tensor


def num_outputs(in_features: int | None, vocab_size: int | None, num_classes: int | None) -> int:
    """How many logits a sequence model gives: its classes, or its vocabulary where it predicts the next token.

    Raises:
        ValueError: it would read vectors and tokens, or neither; or there is nothing to predict.
    """
    if (in_features is None) == (vocab_size is None):
        raise ValueError(
            f"in_features={in_features}, vocab_size={vocab_size}: give one of them, the steps' vectors or their tokens"
        )
    outputs = vocab_size if num_classes is None else num_classes
    if outputs is None:
        raise ValueError("num_classes=None: it is needed without vocab_size, as there is no next token to predict")
    return outputs


def without_padding(inputs: Tensor, valid: Tensor | None) -> Tensor:
    """Zeros in place of what stands in the padding of vectors `(N, L, features)`, be it NaN; tokens as they are."""
    if valid is None or not inputs.is_floating_point():
        return inputs
    return inputs.masked_fill(~valid[..., None], 0.0)
