"""Prepare a trained model for export: compute reparametrized weights once, fold batch norm into the layer before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from ablab.norms.batch import BatchNormLayer
from ablab.norms.layer import NormLayer, UndefinedNorm
from ablab.norms.plain import Identity
from ablab.norms.weight import output_dim

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bake(model: nn.Module) -> nn.Module:
    """Return a copy of the model with the same outputs in evaluation mode that is faster, smaller and exportable.

    Reparametrizations are removed and the computed weights stored as plain parameters. A batch norm is folded into the
    linear layer or convolution right before it, if nothing else reads that layer's output. Other norms are kept. The
    copy is in evaluation mode and is for inference only, not for further training.
    """
    baked = copy.deepcopy(model).eval()
    for module in list(baked.modules()):
        if parametrize.is_parametrized(module):
            remove_parametrizations(module)
    for before, name in list(foldable_pairs(baked)):
        norm = baked.get_submodule(name)
        assert isinstance(norm, BatchNormLayer)
        fold_batch_norm(baked.get_submodule(before), norm)
        baked.set_submodule(name, Identity(norm.activation))
    return baked


def remove_parametrizations(module: nn.Module) -> None:
    """Replace a module's parametrizations by the weights that they compute.

    torch's `remove_parametrizations` modifies the class, which the copy shares with the original module; this does not.
    """
    names = list(module.parametrizations)  # type: ignore[arg-type]
    weights = {name: nn.Parameter(getattr(module, name).detach().clone()) for name in names}
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    for name, weight in weights.items():
        setattr(module, name, weight)


class Tracer(fx.Tracer):
    """An `fx.Tracer` that treats norm layers as leaf modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NormLayer | Identity | UndefinedNorm) or super().is_leaf_module(m, module_qualified_name)


def foldable_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the name of each linear layer or convolution whose output only a batch norm reads, and that norm's name."""
    try:
        graph = Tracer().trace(model)
    except Exception:  # not traceable, for example because of control flow that depends on the inputs
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
        if once and is_foldable(module, norm) and not any(target.startswith(f"{before}.") for target in read):
            yield before, name


def is_foldable(module: nn.Module, norm: nn.Module) -> bool:
    """Return whether `norm` is a batch norm over the output features of `module`, a linear layer or a convolution."""
    if type(norm) is not BatchNormLayer:
        return False
    if norm.layout == "image":
        return isinstance(module, CONVOLUTIONS)
    return norm.layout in ("sequence", "vector") and isinstance(module, nn.Linear)


@torch.no_grad()
def fold_batch_norm(module: nn.Module, norm: BatchNormLayer) -> None:
    """Fold a batch norm, as it works in evaluation, into the weight and bias of the module before it."""
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
    shape = [1] * weight.dim()
    shape[output_dim(module)] = -1
    module.weight = nn.Parameter((weight.double() * scale.view(shape)).to(weight.dtype))
    module.bias = nn.Parameter(shift.to(weight.dtype))
