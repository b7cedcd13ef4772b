"""What each norm says of itself holds of its code: which values meet in a statistic, and all that follows from it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.norms.conftest import FEATURES, NAMED, SCOPES, SHAPES, call, chosen, defined, inputs, make, twin
from torch import Tensor, nn

from ablab.norms import Norm, Statistic, UndefinedNorm, collect_refusals

LAYOUTS = ["image", "sequence", "heads", "vector", "recurrence"]


def positions_last(x: Tensor, shape: str) -> Tensor:
    """`(samples, positions, features)`, the position being the head too where there are heads."""
    if SHAPES[shape][0] == "image":
        return x.flatten(2).transpose(1, 2)
    return x.reshape(len(x), -1, x.shape[-1])


def reach(statistics: tuple[Statistic, ...], size: torch.Size, group_size: int) -> Tensor:
    """Which outputs `(samples, positions, features)` a change of the first input value reaches, by the declaration."""
    reached = torch.zeros(size, dtype=torch.bool)
    reached[0, 0, 0] = True
    for statistic in statistics:
        if statistic.source == "stored":
            continue
        samples = slice(None) if statistic.batch else slice(1)
        positions = slice(None) if statistic.positions else slice(1)
        features = slice({"each": 1, "group": group_size, "all": size[-1]}[statistic.features])
        reached[samples, positions, features] = True
    return reached


@pytest.mark.parametrize("shape", LAYOUTS)
def test_a_change_of_one_value_reaches_what_the_statistics_say_and_nothing_else(norm: Norm, shape: str) -> None:
    layer = make(norm, shape).double()
    if not defined(layer):
        return  # tested below
    x = inputs(shape, torch.float64)
    changed = x.clone()
    changed.view(-1)[0] += 5
    before, after = call(twin(layer), x, shape), call(twin(layer), changed, shape)
    differs = positions_last((after - before).abs() > 1e-9, shape)
    statistics = norm.statistics(SHAPES[shape][0])
    expected = reach(statistics, differs.shape, norm.features_in_group(FEATURES))
    assert torch.equal(differs, expected), statistics


@pytest.mark.parametrize("shape", LAYOUTS)
@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_what_is_constant_within_a_statistic_is_removed(setting: str, shape: str, seed: int) -> None:
    """A gain that the values of a statistic share, and a shift where the mean is subtracted, change no output."""
    norm = chosen(setting)
    layer = make(norm, shape).double()
    statistics = norm.statistics(SHAPES[shape][0])
    if not defined(layer) or not statistics or statistics[0].source == "stored":
        return
    layer.eps = 1e-20  # it alone keeps the invariance from being exact
    [statistic, *_] = statistics  # without a nonlinearity EvoNorm-B0's second one does not count
    generator = torch.Generator().manual_seed(seed)
    x = inputs(shape, torch.float64, seed)
    flat = positions_last(x, shape)
    samples, positions, features = flat.shape
    shared = {"each": 1, "group": norm.features_in_group(FEATURES), "all": features}[statistic.features]
    size = (1 if statistic.batch else samples, 1 if statistic.positions else positions, features // shared)
    gain = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    shift = torch.randn(size, generator=generator, dtype=torch.float64) * 10
    gain, shift = (t.repeat_interleave(shared, 2).expand(flat.shape) for t in (gain, shift))
    if statistic.name == "mean":
        gain = torch.ones_like(gain)
    if "mean" not in statistic.name.split(" and "):
        shift = torch.zeros_like(shift)
    moved = flat * gain + shift
    moved = moved.transpose(1, 2).reshape(x.shape) if SHAPES[shape][0] == "image" else moved.reshape(x.shape)
    before, after = call(twin(layer), x, shape), call(twin(layer), moved, shape)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["image", "sequence"])
def test_training_and_evaluation_agree_where_that_is_declared(norm: Norm, shape: str) -> None:
    before = nn.Conv2d(FEATURES, FEATURES, 1) if shape == "image" else nn.Linear(FEATURES, FEATURES)
    layer = nn.Sequential(norm.wrap(before), make(norm, shape)).double()
    x = inputs(shape, torch.float64)
    layer(x * 0.5)  # a batch before, so that running averages are of something
    trained, evaluated = twin(layer)(x), twin(layer).eval()(x)
    assert torch.allclose(trained, evaluated, rtol=1e-9, atol=1e-9) == norm.train_equals_eval


def test_a_state_beside_what_is_learned_is_declared(norm: Norm) -> None:
    model = nn.Sequential(norm.wrap(nn.Conv2d(3, FEATURES, 3)), norm(FEATURES, "image"))
    assert bool(list(model.buffers())) == norm.has_running_state


def test_the_other_samples_of_a_batch_matter_where_that_is_declared(norm: Norm) -> None:
    layer = make(norm, "image").double()
    x = inputs("image", torch.float64)
    alone, among = twin(layer)(x[:1]), twin(layer)(x)[:1]
    assert (not torch.allclose(alone, among)) == norm.sees_batch
    assert (norm.normalization_batch_size(64, 1) > 1) == norm.sees_batch


@pytest.mark.parametrize("layout", ["sequence", "heads", "vector", "recurrence"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_place_is_refused_exactly_where_the_statistics_forbid_it(norm: Norm, layout: str, causal: bool) -> None:
    taken = [statistic for statistic in norm.statistics(layout) if statistic.source != "stored"]
    leaks = causal and layout == "sequence" and any(statistic.positions for statistic in taken)
    mixes = layout == "heads" and any(statistic.batch or statistic.positions for statistic in taken)
    alone = any(s.features == "each" and not s.batch and not s.positions for s in taken)
    with collect_refusals():
        if layout == "recurrence":
            layer = norm.recurrent(FEATURES, "input", num_steps=6)
        else:
            layer = norm(FEATURES, layout, causal=causal)
    assert isinstance(layer, UndefinedNorm) == (leaks or mixes or alone)
    if isinstance(layer, UndefinedNorm):
        with pytest.raises(ValueError, match=r"choose|set norm"):
            layer(torch.zeros(1))


def test_every_learned_value_belongs_to_one_of_the_norms_parts(norm: Norm, setting: str) -> None:
    """Gain, shift and what a nonlinearity learns; the names are the same for all norms."""
    layer = norm(FEATURES, "image", activation=nn.ReLU())
    names = {name for name, _ in layer.named_parameters()}
    assert names <= {"weight", "bias", "v", "tau", "alpha"} or setting not in {*NAMED, *SCOPES}
    assert ("weight" in names) == norm.has_gain
    assert ("bias" in names) == norm.has_shift == (not norm.needs_bias)
