"""A trained model made plain, for export: weights computed once, batch norm folded into the layer before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ablab.norms.batch import BatchNormLayer
from ablab.norms.layer import NormLayer, Refused
from ablab.norms.plain import Identity
from ablab.norms.weight import output_dim

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bake(model: nn.Module) -> nn.Module:
    """A copy of the model that gives the same outputs in evaluation and is faster, smaller and exportable.

    Reparametrized weights become the weights that they stand for. A batch norm right behind a linear layer or a
    convolution, whose output nothing else reads, is multiplied into it. Other norms stay. The copy is in evaluation
    mode; it is for inference and not for further training.
    """
    baked = copy.deepcopy(model).eval()
    for module in list(baked.modules()):
        if parametrize.is_parametrized(module):
            make_plain(module)
    for before, name in list(foldable(baked)):
        norm = baked.get_submodule(name)
        assert isinstance(norm, BatchNormLayer)
        fold(baked.get_submodule(before), norm)
        baked.set_submodule(name, Identity(norm.activation))
    return baked


def make_plain(module: nn.Module) -> None:
    """Replace what a weight is computed from by the weight.

    torch's `remove_parametrizations` changes the class, which a copied module shares with the one it was copied from.
    """
    names = list(module.parametrizations)  # type: ignore[arg-type]
    weights = {name: nn.Parameter(getattr(module, name).detach().clone()) for name in names}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, weight in weights.items():
        setattr(module, name, weight)


class Tracer(fx.Tracer):
    """Sees norm layers as a whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NormLayer | Identity | Refused) or super().is_leaf_module(m, module_qualified_name)


def foldable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of each linear or convolution, and of the batch norm that alone reads its output."""
    try:
        graph = Tracer().trace(model)
    except Exception:  # whatever it is that cannot be traced, as control flow that depends on the inputs
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    called = [id(model.get_submodule(str(node.target))) for node in calls]
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    for node in calls:
        name, sources = str(node.target), node.all_input_nodes
        if len(sources) != 1 or sources[0] not in calls or len(sources[0].users) > 1:
            continue
        before = str(sources[0].target)
        module, norm = model.get_submodule(before), model.get_submodule(name)
        once = called.count(id(norm)) == called.count(id(module)) == 1
        if once and fits(module, norm) and not any(target.startswith(f"{before}.") for target in read):
            yield before, name


def fits(module: nn.Module, norm: nn.Module) -> bool:
    """Whether a norm is a batch norm over the output features of a linear layer or a convolution."""
    if type(norm) is not BatchNormLayer:
        return False
    if norm.layout == "image":
        return isinstance(module, CONVOLUTIONS)
    return norm.layout in ("sequence", "vector") and isinstance(module, nn.Linear)


@torch.no_grad()
def fold(module: nn.Module, norm: BatchNormLayer) -> None:
    """Multiply a batch norm in evaluation into the weight and bias of the module before it."""
    weight: Any = module.weight
    scale = torch.ones_like(norm.running_var, dtype=torch.float64)
    if not norm.norm.mean_only:
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if isinstance(module.bias, Tensor):
        shift = shift + module.bias.double() * scale
    beside = [1] * weight.dim()
    beside[output_dim(module)] = -1
    module.weight = nn.Parameter((weight.double() * scale.view(beside)).to(weight.dtype))
    module.bias = nn.Parameter(shift.to(weight.dtype))
