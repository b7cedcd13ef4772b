"""The contract of every layer: each norm, layout and dtype, alone and as torch's machinery handles modules."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from tests.norms.conftest import FEATURES, SETTINGS, SHAPES, call, defined, inputs, make, twin
from torch import nn

from ablab.norms import Norm
from ablab.norms.batch import BatchNormLayer

NARROW = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
LAYOUTS = ["image", "sequence", "heads", "vector", "recurrence"]


def memory_format(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not x.is_contiguous() else torch.contiguous_format


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["bare", "activated"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_shape_dtype_and_memory_stay_and_every_gradient_is_finite(
    norm: Norm, shape: str, activation: nn.Module | None
) -> None:
    layer = make(norm, shape, activation)
    if not defined(layer):
        return  # its refusal is tested with the declarations
    for name, dtype in NARROW.items():
        x = inputs(shape, dtype).requires_grad_()
        other = twin(layer).to(dtype)
        exact = call(twin(other).double(), x.detach().double(), shape)
        y = call(other, x, shape)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert memory_format(y) == memory_format(x)
        tolerance = 0.04 if name == "bfloat16" else 1e-4
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * 3)
        y.float().square().sum().backward()
        for parameter in [x, *(p for p in other.parameters() if p.requires_grad)]:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("shape", LAYOUTS)
def test_under_autocast_the_output_has_the_inputs_dtype(norm: Norm, shape: str) -> None:
    layer = make(norm, shape)
    if not defined(layer):
        return
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(shape, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = call(twin(layer), x, shape)
        assert y.dtype == dtype
        exact = call(twin(layer), x.float(), shape)
        torch.testing.assert_close(y.float(), exact, rtol=0.04, atol=0.12)


def test_running_averages_stay_in_float32_and_move_in_bfloat16(norm: Norm) -> None:
    layer = make(norm, "image")
    layer.to(torch.bfloat16)
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            assert buffer.dtype == torch.float32, name
    if not isinstance(layer, BatchNormLayer) or layer.norm.frozen:
        return
    before = layer.running_var.clone()
    layer.norm.momentum = 1e-3
    layer(inputs("image", torch.bfloat16))
    assert not torch.equal(layer.running_var, before) or layer.norm.mean_only
    assert layer.double().running_mean.dtype == torch.float64
    layer.to(torch.bfloat16)(inputs("image", torch.bfloat16))  # and back


@pytest.mark.parametrize("shape", LAYOUTS)
def test_the_gradient_is_that_of_finite_differences(norm: Norm, shape: str) -> None:
    layer = make(norm, shape, nn.Softplus(), features=8 if norm.features_in_group(FEATURES) == 1 else FEATURES)
    if not defined(layer):
        return
    if isinstance(layer, BatchNormLayer):
        layer.norm.renorm_start = layer.norm.renorm_end = 10**6  # its correction is a constant to the gradient
    layer.double()
    x = inputs(shape, torch.float64)[:3]
    if SHAPES[shape][0] == "image":
        x = x[:, : layer.num_features if hasattr(layer, "num_features") else FEATURES, :2, :2]
    else:
        x = x[..., : layer.num_features if hasattr(layer, "num_features") else FEATURES]
    if x.dim() == 3 and shape == "sequence":
        x = x[:, :3]
    x = x.contiguous().requires_grad_()
    learned = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def output(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        arguments = (x, None, 2) if shape == "recurrence" else (x,)
        return torch.func.functional_call(layer, dict(zip(learned, values, strict=True)), arguments)

    torch.autograd.gradcheck(output, (x, *learned.values()), fast_mode=True)


@pytest.mark.parametrize("shape", LAYOUTS)
def test_copies_pickles_and_state_dicts_carry_everything(norm: Norm, shape: str) -> None:
    layer = make(norm, shape)
    if not defined(layer):
        return
    call(layer, inputs(shape), shape)  # running averages that are of something
    layer.eval()
    expected = call(layer, inputs(shape, seed=1), shape)
    loaded = make(norm, shape)
    loaded.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded.eval()):
        assert torch.equal(call(other, inputs(shape, seed=1), shape), expected)


# each norm for images and for another layout, in turn; the other layouts are marked thorough
COMPILED = [
    pytest.param(setting, layout, marks=[pytest.mark.thorough] * (i not in (0, 1 + number % (len(LAYOUTS) - 1))))
    for number, setting in enumerate(SETTINGS)
    for i, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("setting", "shape"), COMPILED)
def test_it_compiles_as_one_graph_that_computes_the_same(norm: Norm, setting: str, shape: str) -> None:
    """In training or not: every norm and every layout meets both."""
    number = SETTINGS.index(setting) // (len(LAYOUTS) - 1)
    training = (number % 2 == 0) == (shape == LAYOUTS[0])
    layer = make(norm, shape, nn.ReLU()).train(training)
    if not defined(layer):
        return
    torch._dynamo.reset()
    eager, compiled = twin(layer), twin(layer)
    run = torch.compile(functools.partial(call, compiled, shape=shape), fullgraph=True, backend="aot_eager")
    x, y = (inputs(shape).requires_grad_() for _ in range(2))
    ours, expected = run(x), call(eager, y, shape)
    torch.testing.assert_close(ours, expected)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for (name, a), (_, b) in zip(compiled.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["bare", "activated"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_changes_no_valid_output_no_gradient_and_no_buffer(
    norm: Norm, training: bool, activation: nn.Module | None
) -> None:
    """Neither what stands in padding nor how much of it there is; NaN in it spoils the gradients alone."""
    layer = make(norm, "sequence", activation).double().train(training)
    lengths = torch.tensor([6, 4, 1, 3])
    valid = torch.arange(6) < lengths[:, None]
    x = inputs("sequence", torch.float64)
    junk = torch.where(valid[..., None], x, 1e4)
    longer = torch.cat([torch.where(valid[..., None], x, 1e4), torch.full((4, 3, FEATURES), 7.0).double()], 1)
    more = torch.cat([valid, torch.zeros(4, 3, dtype=torch.bool)], 1)
    results = []
    for values, mask in ((x, valid), (junk, valid), (longer, more)):
        other, values = twin(layer), values.clone().requires_grad_()
        y = other(values, mask)[mask]
        y.square().sum().backward()
        results.append([y, values.grad[mask], *(p.grad for p in other.parameters()), *other.buffers()])
    for result in results[1:]:
        for ours, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    spoiled, other = x.masked_fill(~valid[..., None], float("nan")), twin(layer)
    torch.testing.assert_close(other(spoiled, valid)[valid], results[0][0])
    assert all(buffer.isfinite().all() for buffer in other.buffers())


def test_a_mask_without_padding_changes_nothing(norm: Norm) -> None:
    for shape in ("sequence", "recurrence, all steps"):
        layer = make(norm, shape).double()
        if defined(layer):
            x = inputs(shape, torch.float64)
            masked = twin(layer)(x, torch.ones(x.shape[:2], dtype=torch.bool))
            torch.testing.assert_close(masked, twin(layer)(x), rtol=1e-9, atol=1e-9)


def test_steps_one_by_one_are_all_steps_at_once(norm: Norm) -> None:
    layer = make(norm, "recurrence").double()
    if not defined(layer):
        return
    x = inputs("recurrence, all steps", torch.float64)
    valid = torch.arange(6) < torch.tensor([6, 4, 1, 3])[:, None]
    for mask in (None, valid):
        at_once, single = twin(layer), twin(layer)
        steps = [single(x[:, t], None if mask is None else mask[:, t], t) for t in range(6)]
        where = torch.ones(4, 6, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(torch.stack(steps, 1)[where], at_once(x, mask)[where])
        for a, b in zip(single.buffers(), at_once.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_a_square_sequence_is_normalized_over_the_declared_dimension(norm: Norm) -> None:
    """Where L == C, torch's own norms would take the wrong axis in silence."""
    layer = make(norm, "sequence").double()
    x = torch.randn(4, FEATURES, FEATURES, dtype=torch.float64)
    order = torch.randperm(FEATURES)  # of the steps: the output is reordered, as no statistic knows their order
    torch.testing.assert_close(twin(layer)(x[:, order]), twin(layer)(x)[:, order])
    parameters = [p for p in layer.parameters() if p.shape == (FEATURES,)]
    if parameters:  # of the features: their gains are not those of the others
        assert not torch.allclose(twin(layer)(x[..., order]), twin(layer)(x)[..., order])
