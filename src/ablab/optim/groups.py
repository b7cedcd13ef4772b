"""Parameter groups for weight decay, by the module that owns a parameter rather than by its shape."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

# The decayed parameters of torch's modules; biases, gains and embeddings are not decayed.
DECAYED: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Linear, ("weight",)),
    (nn.modules.conv._ConvNd, ("weight",)),
    (nn.Bilinear, ("weight",)),
    (nn.Embedding, ()),
    (nn.EmbeddingBag, ()),
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.modules.batchnorm._NormBase, ()),
    (nn.LayerNorm, ()),
    (nn.RMSNorm, ()),
    (nn.GroupNorm, ()),
    (nn.PReLU, ()),
)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups, one with weight decay and one without.

    Weights of linear layers and convolutions are decayed; biases, gains, shifts and embeddings are not. Under weight
    norm, the direction v is decayed and the length g is not. A custom module declares its decayed parameters in a class
    attribute, `weight_decay = ("weight",)`, or `()` for none. Without one, its matrices are decayed, its vectors and
    scalars are not, and a line on stderr says so.

    Args:
        model: the model; every trainable parameter ends up in exactly one group.
        weight_decay: weight decay of the first group.

    Raises:
        ValueError: two modules share a parameter, and only one of them decays it.
    """
    decayed: dict[int, nn.Parameter] = {}
    kept: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # handled below, with the module whose weight it computes
        names = decayed_names(name, module)
        own = dict(module.named_parameters(recurse=False))
        if parametrize.is_parametrized(module):
            for tensor_name, chain in module.parametrizations.items():
                for original, parameter in chain.named_parameters(recurse=False):
                    # weight norm stores g as original0 and v as original1; others store the weight as original
                    is_gain = original == "original0"
                    (decayed if tensor_name in names and not is_gain else kept)[id(parameter)] = parameter
        for tensor_name, parameter in own.items():
            (decayed if tensor_name in names else kept)[id(parameter)] = parameter
    if both := decayed.keys() & kept.keys():
        shared = [name for name, parameter in model.named_parameters() if id(parameter) in both]
        raise ValueError(
            f"{', '.join(shared)}: shared by two modules of which only one decays it; share it among equals"
        )
    return [
        {"params": [p for p in decayed.values() if p.requires_grad], "weight_decay": weight_decay},
        {"params": [p for p in kept.values() if p.requires_grad], "weight_decay": 0.0},
    ]


def decayed_names(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the names of the module's direct parameters that are decayed."""
    declared = getattr(type(module), "weight_decay", None)
    if isinstance(declared, str):
        raise ValueError(
            f"{type(module).__name__}.weight_decay is a text; write a tuple, weight_decay = ({declared!r},)"
        )
    if isinstance(declared, tuple | list):  # ignore an unrelated attribute, such as a number
        return tuple(declared)
    for kind, names in DECAYED:
        if isinstance(module, kind):
            return names
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.RNNBase):
        return tuple(key for key in own if key.startswith("weight"))
    matrices = tuple(key for key, parameter in own.items() if parameter.dim() > 1)
    if own and type(module) not in warned_types:
        warned_types.add(type(module))
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            print(
                f"weight decay: {name or 'the model'} ({type(module).__name__}) does not say which of its parameters "
                f"decay, so matrices do ({', '.join(matrices) or 'none'}), vectors and scalars do not; a class "
                'attribute decides it, weight_decay = ("weight",)',
                file=sys.stderr,
            )
    return matrices


warned_types: set[type] = set()  # module classes that have been warned about


def split_norm_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of norms (gains and shifts), and all others.

    A parameter counts as a norm's if it is a vector of a module without decayed parameters.
    """
    norms: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not isinstance(module, parametrize.ParametrizationList) and not decayed_names(name, module):
            norms |= {id(p): p for p in own.values() if p.dim() == 1}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in norms], [p for p in trained if id(p) not in norms]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights with at least two dimensions of all layers except the first and the last.

    Embeddings count as layers. Layers are taken in registration order, which must be the order of the forward pass.
    """
    layers: list[list[nn.Parameter]] = []
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        names = decayed_names(name, module)
        own = [p for key, p in module.named_parameters(recurse=False) if key in names]
        if parametrize.is_parametrized(module):
            own += [
                parameter
                for tensor_name, chain in module.parametrizations.items()
                for original, parameter in chain.named_parameters(recurse=False)
                if tensor_name in names and original != "original0"
            ]
        matrices = [p for p in own if p.dim() > 1]
        if matrices or isinstance(module, nn.Embedding):
            layers.append(matrices)
    hidden = {id(p): p for matrices in layers[1:-1] for p in matrices if p.requires_grad}
    return list(hidden.values())
