"""Every architecture with every norm: defined pairs learn and keep their contracts, the others are refused.

Both lists come from the YAMLs: a new norm or model takes part by existing. A model that tests/pairs.py does not know
may refuse any norm with a reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from tests.conftest import choices
from tests.norms.conftest import NAMED
from tests.pairs import PAIRS, declared, defined, in_turn
from torch import nn

from ablab.lab.config.build import build
from ablab.norms import Norm, collect_refusals, find_norm_problems

KNOWN = {"airbench", "mlp", "resnet", "resnet18", "resnet50", "rnn", "transformer", "unet"}
OWN = [(name, "its own") for name in choices("model") if name not in KNOWN]  # each with the data that it chooses

# What is left of the first loss after a few hundred steps on one batch. The others come down to a tenth; these cannot:
LEFT = {
    "spectralnorm": 0.8,  # every layer's largest singular value is 1, the head's too
    "dyt": 0.7,  # does not enlarge GPT-2's small embeddings
    "frozenbatchnorm": 0.97,  # inside a recurrence all it does is to multiply by a fixed 0.1
}

SMALL = {"unet": ("model.depth=1", "model.width=8")}  # for the time that its tests take

Make = Callable[..., tuple[nn.Module, Any]]


@pytest.fixture
def make(config: Callable[..., DictConfig], batch: Callable[..., Any]) -> Make:
    """A model of the config with a norm of the config, and a real batch for it."""

    def build_pair(model: str, norm: str, kind: str, *words: str) -> tuple[nn.Module, Any]:
        cfg = config(f"model={model}", *SMALL.get(model, ()), *words)
        its_norm = config(f"norm={norm}").norm  # composed on its own, once for all models
        if kind == "its own":
            data = build(cfg.data)
            data.setup()
            example, sizes = data.first_samples(16), data.model_sizes
        else:
            example, sizes = batch(kind, 4 if kind == "masks" else 16)  # a mask has hundreds of targets
        torch.manual_seed(0)
        with collect_refusals():
            return build(cfg.model, norm=build(its_norm), **sizes), example

    return build_pair


def classes_last(logits: torch.Tensor) -> torch.Tensor:
    """Logits of segmentation, `(N, num_classes, H, W)`, with the classes where other models have them."""
    return logits.movedim(1, -1) if logits.dim() == 4 else logits


@pytest.mark.parametrize("norm", sorted(NAMED))
def test_where_a_norm_is_defined_follows_from_its_statistics(norm: str) -> None:
    for model, kind in [*PAIRS, ("resnet18", "images"), ("resnet50", "images")]:
        assert declared(model, kind, norm) == defined(model, kind, norm), (model, kind)


@pytest.mark.parametrize(("model_name", "kind", "norm"), in_turn(PAIRS))
def test_a_defined_pair_overfits_one_batch(make: Make, model_name: str, kind: str, norm: str) -> None:
    model, example = make(model_name, norm, kind)
    overfit(model, example, LEFT.get(norm, 0.1))


@pytest.mark.parametrize("model_name", [name for name, _ in OWN] or ["resnet"])
def test_a_model_of_ones_own_overfits_one_batch_with_the_norm_that_it_chooses(
    config: Callable[..., DictConfig], model_name: str
) -> None:
    cfg = config(f"model={model_name}")
    data = build(cfg.data)
    data.setup()
    torch.manual_seed(0)
    overfit(build(cfg.model, norm=build(cfg.norm), **data.model_sizes), data.first_samples(16), 0.1)


def overfit(model: nn.Module, example: Any, left: float) -> None:
    """Train on one batch until so much is left of the first loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    first = last = float("nan")
    for step in range(300):
        logits = classes_last(model(example.inputs))
        loss = F.cross_entropy(logits.flatten(0, -2), example.targets.flatten())
        first, last = (loss.item() if step == 0 else first), loss.item()
        if last < left * first:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert last < left * first, f"from {first:.3f} to {last:.3f}"


@pytest.mark.parametrize(("model_name", "kind"), [*PAIRS, *OWN])
def test_a_pair_keeps_its_contract_or_is_refused(
    make: Make, config: Callable[..., DictConfig], model_name: str, kind: str, norm_choice: str
) -> None:
    keeps_its_contract_or_is_refused(make, config, model_name, kind, norm_choice)


LARGE = [
    pytest.param(model, norm, marks=[pytest.mark.thorough] * (number % 3 != 1 or number % 2 != i))
    for number, norm in enumerate(choices("norm"))
    for i, model in enumerate(("resnet18", "resnet50"))
]


@pytest.mark.parametrize(("model_name", "norm"), LARGE)
def test_a_norm_keeps_its_contract_in_a_large_resnet_or_is_refused(
    make: Make, config: Callable[..., DictConfig], model_name: str, norm: str
) -> None:
    """Every third norm, in turn in ResNet-18 and in ResNet-50, which have norms at the places of the small ResNet."""
    keeps_its_contract_or_is_refused(make, config, model_name, "images", norm)


def keeps_its_contract_or_is_refused(
    make: Make, config: Callable[..., DictConfig], model_name: str, kind: str, norm_choice: str
) -> None:
    model, example = make(model_name, norm_choice, kind)
    norm = build(config(f"norm={norm_choice}").norm)
    found = find_norm_problems(model, norm, lambda: model(example.inputs))
    assert kind == "its own" or bool(found) != defined(model_name, kind, norm_choice), found
    if found:
        assert all(re.search("choose|set norm|use larger", reason) for reason in found)
        names = {name for name, _ in model.named_modules()} | {type(model).__name__}
        assert all(name in names for places in found.values() for name in places)
        return
    logits = classes_last(model(example.inputs))
    assert logits.shape[:-1] == example.targets.shape
    assert logits.shape[-1] > example.targets.max()
    assert kind == "its own" or logits.shape[-1] == model.head.out_features
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name

    twin = copy.deepcopy(model)
    other, _ = make(model_name, norm_choice, kind)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected_logits = model.eval()(example.inputs)
        torch.testing.assert_close(twin.eval()(example.inputs), expected_logits, rtol=0, atol=0)
        torch.testing.assert_close(other.eval()(example.inputs), expected_logits, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("model_name", "kind", "norm"), in_turn(PAIRS))
def test_a_defined_pair_trains_in_bfloat16(make: Make, model_name: str, kind: str, norm: str, precision: str) -> None:
    """Statistics in float32: the logits are those of float32, as exactly as bfloat16 can have them."""
    model, example = make(model_name, norm, kind)
    exact = copy.deepcopy(model)(example.inputs)
    inputs = example.inputs
    if precision == "bf16-true":
        model.to(torch.bfloat16)
        inputs = inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = model(inputs)
    assert (logits.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.05
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad and p.grad is not None)
    averages = [b for name, b in model.named_buffers() if "running" in name]
    assert all(b.dtype == torch.float32 and b.isfinite().all() for b in averages)


@pytest.mark.parametrize(("model_name", "kind"), PAIRS)
def test_names_of_parameters_differ_only_where_the_mathematics_does(make: Make, model_name: str, kind: str) -> None:
    def names(norm: str) -> set[str]:
        model, _ = make(model_name, norm, kind)
        return {name for name, _ in model.named_parameters()}

    plain, layer = names("none"), names("layernorm")
    assert all("norm" in name or "shortcut.1" in name for name in layer - plain)
    assert all(name.endswith(".bias") for name in plain - layer)
    assert {name.replace("parametrizations.weight.original1", "weight") for name in names("weightnorm")} - plain == {
        name for name in names("weightnorm") if name.endswith("original0")
    }


@pytest.mark.parametrize(("model_name", "kind", "norm"), in_turn(PAIRS))
def test_the_same_seed_draws_the_same_weights_for_every_norm(make: Make, model_name: str, kind: str, norm: str) -> None:
    """What is compared by seed then differs by the norm alone."""

    def drawn(its_norm: str) -> dict[str, torch.Tensor]:
        model, _ = make(model_name, its_norm, kind)
        tensors = dict(model.named_parameters())
        ends = (".parametrizations.weight.original1", ".parametrizations.weight.original")
        return {
            name.removesuffix(ends[0]).removesuffix(ends[1]).removesuffix(".weight"): p for name, p in tensors.items()
        }

    plain, other = drawn("none"), drawn(norm)
    shared = [name for name in plain if name in other and "norm" not in name]
    weights = [name for name in shared if plain[name].dim() > 1]
    assert len(weights) >= 3
    last = [name for name in weights if "convs.1" in name]  # zero without a norm, so that the branch starts as zero
    assert all(torch.equal(plain[name], other[name]) for name in weights if name not in last)


@pytest.mark.parametrize("model_name", ["transformer", "rnn"])
def test_a_causal_model_never_looks_ahead(make: Make, model_name: str, norm_choice: str) -> None:
    if not defined(model_name, "text", norm_choice):
        return
    model, example = make(model_name, norm_choice, "text")
    tokens = example.inputs
    for step in (3, 9):
        changed = tokens.clone()
        changed[:, step:] = (changed[:, step:] + 1) % 50
        with torch.no_grad():
            before, after = copy.deepcopy(model)(tokens), copy.deepcopy(model)(changed)
            torch.testing.assert_close(after[:, :step], before[:, :step])
            assert not torch.allclose(after[:, step], before[:, step])


@pytest.mark.parametrize("model_name", ["transformer", "rnn"])
@pytest.mark.parametrize("words", [(), ("model.bidirectional=true",), ("model.norm_first=false",)])
def test_padding_changes_no_prediction(make: Make, model_name: str, words: tuple[str, ...], norm_choice: str) -> None:
    if ("bidirectional" in str(words)) > (model_name == "rnn") or ("norm_first" in str(words)) > (model_name != "rnn"):
        return
    if not defined(model_name, "sequences", norm_choice):
        return
    model, example = make(model_name, norm_choice, "sequences", *words)
    lengths = torch.arange(16) % 5 + 4
    valid = torch.arange(8) < lengths[:, None]
    other = torch.where(valid[..., None], example.inputs, float("nan"))
    results = []
    for inputs in (example.inputs, other):
        trained = copy.deepcopy(model)
        logits = trained(inputs, valid)
        logits.square().sum().backward()
        gradients = [p.grad for p in trained.parameters() if p.requires_grad]
        results.append([logits.detach(), *gradients, *trained.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(model(example.inputs, valid), model(other, valid))
        short = model(example.inputs[:1, : lengths[0]])
        torch.testing.assert_close(model(other[:1], valid[:1]), short, rtol=1e-4, atol=1e-5)


CELLS = ["elman", "gru", "lstm"]


# each norm with one cell in one direction or in two, in turn; the other cells of a norm are marked thorough
RECURRENT = [
    pytest.param(cell, (number // 3 + i) % 2 == 1, norm, marks=[pytest.mark.thorough] * (number % 3 != i))
    for number, norm in enumerate(norm for norm in choices("norm") if defined("rnn", "sequences", norm))
    for i, cell in enumerate(CELLS)
]


@pytest.mark.parametrize(("cell", "bidirectional", "norm"), RECURRENT)
def test_every_recurrent_cell_learns_with_every_norm(make: Make, cell: str, bidirectional: bool, norm: str) -> None:
    words = (
        f"model.cell={cell}",
        f"model.bidirectional={str(bidirectional).lower()}",
        "model.num_layers=2",
        "model.hidden_size=32",
    )
    model, example = make("rnn", norm, "sequences", *words)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(example.inputs), example.targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < LEFT.get(norm, 0.5) * losses[0]


def test_the_factory_fulfils_what_models_ask_for() -> None:
    from ablab.models.interface import NormFactory

    wanted = {name for name in vars(NormFactory) if not name.startswith("_")} | {"__call__"}
    assert all(hasattr(Norm, name) for name in wanted)
