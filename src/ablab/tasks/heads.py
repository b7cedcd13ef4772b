"""Remove the head of a classifier, for tasks that need its features."""

from __future__ import annotations

from torch import nn


def remove_head(model: nn.Module) -> int:
    """Replace the head of a classifier with the identity, and return the number of its input features.

    Raises:
        ValueError: the model has no linear layer named `head`.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        found = "no attribute head" if head is None else f"a head of class {type(head).__name__}"
        raise ValueError(
            f"{type(model).__name__} has {found}, and a torch.nn.Linear of this name is expected, from the features to "
            "the logits; choose model=resnet, or call the model's last layer head"
        )
    model.head = nn.Identity()
    return head.in_features
