"""Reparametrized weights: what defines each, what they refuse, and that a residual branch can start as zero."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ablab.norms import (
    BatchNorm,
    DyT,
    FilterResponseNorm,
    LayerNorm,
    NoNorm,
    Norm,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
    WeightReparametrization,
    WeightStandardization,
)

MODULES = {
    "linear": lambda: nn.Linear(5, 3),
    "conv1d": lambda: nn.Conv1d(5, 3, 3),
    "conv2d": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(5, 3, 2),
    "transposed": lambda: nn.ConvTranspose2d(5, 3, 3),
}
ALL = [WeightNorm(), WeightStandardization(), SpectralNorm()]


def original(module: nn.Module) -> torch.Tensor:
    """The tensor that a reparametrization starts from: v."""
    chain: Any = module.parametrizations["weight"]
    return chain.original1 if hasattr(chain, "original1") else chain.original


def outputs_first(module: nn.Module) -> torch.Tensor:
    weight = module.weight.detach()
    return (weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight).flatten(1)


@pytest.mark.parametrize("kind", list(MODULES))
def test_weight_norm_changes_no_output_at_first_and_takes_the_length_out_of_v(kind: str) -> None:
    module = MODULES[kind]().double()
    before = module.weight.detach().clone()
    WeightNorm()(module)
    torch.testing.assert_close(module.weight, before)
    with torch.no_grad():
        original(module).mul_(7)
    torch.testing.assert_close(module.weight, before)
    length = module.parametrizations.weight.original0
    torch.testing.assert_close(outputs_first(module).norm(dim=1), length.detach().flatten())
    assert length.numel() == 3 + (kind == "conv2d")


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "transposed"])
@settings(max_examples=10)
@given(gain=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_weight_standardization_is_the_papers_and_forgets_gain_and_shift(kind: str, gain: float, shift: float) -> None:
    module = WeightStandardization(eps=1e-20)(MODULES[kind]().double())
    before = module.weight.detach().clone()
    flat = outputs_first(module)
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(flat.var(1, correction=0), torch.ones(len(flat)).double())  # the biased one
    with torch.no_grad():
        original(module).mul_(gain).add_(shift)
    torch.testing.assert_close(module.weight, before)


def test_weight_standardizations_eps_is_inside_the_root() -> None:
    conv = nn.Conv2d(2, 1, 2, bias=False).double()
    v = conv.weight.detach().clone()
    std = torch.sqrt(v.square().mean() - v.mean().square() + 0.3)
    torch.testing.assert_close(WeightStandardization(eps=0.3)(conv).weight, (v - v.mean()) / std)


def test_weight_standardization_leaves_linear_layers_alone() -> None:
    linear = nn.Linear(5, 3)
    before = linear.weight.clone()
    assert torch.equal(WeightStandardization()(linear).weight, before)


@pytest.mark.parametrize("kind", list(MODULES))
def test_spectral_norm_makes_the_largest_singular_value_one(kind: str) -> None:
    module = SpectralNorm(num_iterations=50)(MODULES[kind]().double())
    _ = module.weight
    assert torch.linalg.matrix_norm(outputs_first(module), 2).item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        original(module).mul_(9)
    assert torch.linalg.matrix_norm(outputs_first(module), 2).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("weight", ALL, ids=repr)
def test_wrapped_modules_are_copied_pickled_loaded_and_compiled(weight: WeightReparametrization) -> None:
    module = weight(nn.Conv2d(3, 4, 3)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = module(x)
    other = weight(nn.Conv2d(3, 4, 3)).eval()
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), other):
        assert torch.equal(twin(x), expected)
    with pytest.raises(RuntimeError, match="parametrized"):  # torch's rule; a state dict is what is saved
        pickle.dumps(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("weight", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_finite_in_every_dtype(weight: WeightReparametrization, dtype: torch.dtype) -> None:
    module = weight(nn.Conv2d(3, 4, 3)).to(dtype)
    module(torch.randn(2, 3, 6, 6, dtype=dtype)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("weight", ALL, ids=repr)
def test_the_gradient_is_that_of_finite_differences(weight: WeightReparametrization) -> None:
    module = weight(nn.Conv2d(2, 3, 2)).double().eval()
    values = dict(module.named_parameters())

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(values, parameters, strict=True)), (x,))

    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(output, (x, *values.values()), fast_mode=True)


def test_zero_init_makes_the_branch_of_every_norm_zero(norm: Norm) -> None:
    """But where nothing can be zero, which is tested below, and where nothing is learned."""
    if norm.weight.title == "spectral norm" or getattr(norm, "frozen", False):
        return
    conv = norm.wrap(nn.Conv2d(3, 16, 3))
    nn.init.zeros_(conv.bias)
    layer = norm(16, "image")
    norm.zero_init(layer, conv)
    y = layer(conv(torch.randn(4, 3, 6, 6)))
    assert y.abs().max() == 0
    (y - torch.randn_like(y)).square().sum().backward()
    learned = [p for p in [*layer.parameters(), *conv.parameters()] if p.grad is not None]
    assert all(p.grad.isfinite().all() for p in learned)
    assert max(p.grad.abs().max() for p in learned) > 0


@pytest.mark.parametrize("weight", [None, WeightNorm()], ids=repr)
@pytest.mark.parametrize(
    "make",
    [
        BatchNorm,
        LayerNorm,
        RMSNorm,
        FilterResponseNorm,
        DyT,
        NoNorm,
        lambda weight: BatchNorm(mean_only=True, weight=weight),
    ],
)
def test_zero_init_makes_a_branch_zero_that_can_still_learn(make: type[Norm], weight: WeightNorm | None) -> None:
    norm = make(weight=weight)
    conv = norm.wrap(nn.Conv2d(3, 8, 3, bias=norm.needs_bias))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layer = norm(8, "image")
    norm.zero_init(layer, conv)
    y = layer(conv(torch.randn(2, 3, 6, 6)))
    assert y.abs().max() == 0
    (y - torch.randn_like(y)).square().sum().backward()
    gradients = [p.grad for p in [*layer.parameters(), *conv.parameters()] if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 0


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (BatchNorm(affine=False), "a zero before it would be divided by eps"),
        (NoNorm(weight=WeightStandardization()), "a constant filter has no variance"),
        (NoNorm(weight=SpectralNorm()), "a zero matrix has no singular vectors"),
    ],
    ids=["no gain", "weight standardization", "spectral norm"],
)
def test_what_cannot_be_zero_is_left_alone_by_zero_init(norm: Norm, why: str) -> None:
    conv = norm.wrap(nn.Conv2d(3, 8, 3))
    before = {name: p.clone() for name, p in conv.named_parameters()}
    norm.zero_init(norm(8, "image"), conv)
    assert all(torch.equal(p, before[name]) for name, p in conv.named_parameters()), why
