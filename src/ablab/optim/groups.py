"""Weight decay by the module that owns a parameter, never by the parameter's shape."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

# torch's own modules: which of their parameters are decayed. Biases, gains and embeddings are not.
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
    """Split the model's parameters in those that are decayed and those that are not.

    Weights of linear and convolution layers are decayed; biases, gains, shifts and embeddings are not, and neither is
    the length g of weight norm, while its direction v is. A module with parameters of its own says which are decayed
    by a class attribute, `weight_decay = ("weight",)`, or `()` for none. Otherwise matrices are decayed, vectors and
    scalars are not, and a line on the standard error says so.

    Args:
        model: every parameter of it that is trained is in exactly one group.
        weight_decay: of the first group.

    Raises:
        ValueError: a parameter is shared by two modules of which one decays it.
    """
    decayed: dict[int, nn.Parameter] = {}
    kept: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # its parameters are listed with the module that they make a weight of
        names = decayed_names(name, module)
        own = dict(module.named_parameters(recurse=False))
        if parametrize.is_parametrized(module):
            for tensor_name, chain in module.parametrizations.items():
                for original, parameter in chain.named_parameters(recurse=False):
                    # weight norm keeps g as original0 and v as original1; a single original is the weight itself
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
    """The module's own parameters that are decayed."""
    declared = getattr(type(module), "weight_decay", None)
    if isinstance(declared, str):
        raise ValueError(
            f"{type(module).__name__}.weight_decay is a text; write a tuple, weight_decay = ({declared!r},)"
        )
    if isinstance(declared, tuple | list):  # a number is somebody's own setting
        return tuple(declared)
    for kind, names in DECAYED:
        if isinstance(module, kind):
            return names
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.RNNBase):
        return tuple(key for key in own if key.startswith("weight"))
    matrices = tuple(key for key, parameter in own.items() if parameter.dim() > 1)
    if own and type(module) not in noticed:
        noticed.add(type(module))
        if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
            print(
                f"weight decay: {name or 'the model'} ({type(module).__name__}) does not say which of its parameters "
                f"decay, so matrices do ({', '.join(matrices) or 'none'}), vectors and scalars do not; a class "
                'attribute decides it, weight_decay = ("weight",)',
                file=sys.stderr,
            )
    return matrices


noticed: set[type] = set()  # kinds of modules about which a line was printed


def norms_and_others(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What norms learn, gains and shifts, and everything else that is trained.

    Norms are the modules of which nothing decays and whose own parameters are vectors.
    """
    norms: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own and not isinstance(module, parametrize.ParametrizationList) and not decayed_names(name, module):
            norms |= {id(p): p for p in own.values() if p.dim() == 1}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in norms], [p for p in trained if id(p) not in norms]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights between the first layer and the last: matrices, or convolutions that are matrices of their patches.

    Embeddings count as layers. A model that has its layers in another order than it uses them in should not be asked.
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
