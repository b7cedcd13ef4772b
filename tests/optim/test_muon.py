"""Muon: torch's own on matrices, orthogonal steps on convolutions, one optimizer to save and to schedule."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ablab.optim.decoupled_sgd import DecoupledSGD
from ablab.optim.groups import hidden_matrices
from ablab.optim.muon import Muon, orthogonalize
from ablab.optim.optimizer import make_optimizer

RESTS: list[Callable[..., Any]] = [
    partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    partial(DecoupledSGD, lr=1.0, weight_decay=0.01, norm_lr_scale=4.0),
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(32, 5))


def steps(net: nn.Module, optimizer: Any, number: int, schedule: Any = None) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 3, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator)
    losses = []
    for _ in range(number):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_the_singular_values_of_what_is_made_orthogonal_are_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalize(torch.randn(4, *shape), 5))
    assert singular.max() < 1.3
    assert (singular > 0.5).float().mean() > 0.95  # of a square matrix, some begin very small


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_on_matrices_it_is_torchs_own(shape: tuple[int, int], nesterov: bool) -> None:
    """torch's computes in bfloat16, also on the CPU: a step differs by what that rounds."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    bias = nn.Parameter(torch.zeros(1))
    one = Muon([{"params": [ours]}, {"params": [bias]}], rest=torch.optim.AdamW, **settings)
    other = torch.optim.Muon([theirs], **settings)
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        before = theirs.detach().clone()
        one.step()
        other.step()
        assert (ours - theirs).norm() < 0.03 * (theirs - before).norm()
        with torch.no_grad():
            theirs.copy_(ours)


def test_a_convolution_is_the_matrix_of_its_patches() -> None:
    torch.manual_seed(0)
    conv, matrix = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.zeros(8, 36))
    with torch.no_grad():
        matrix.copy_(conv.flatten(1))
    conv.grad = torch.randn_like(conv)
    matrix.grad = conv.grad.flatten(1)
    rest = nn.Parameter(torch.zeros(1))
    for parameter in (conv, matrix):
        Muon([{"params": [parameter]}, {"params": [rest]}], rest=torch.optim.AdamW, fixed_norm=True).step()
    torch.testing.assert_close(conv.flatten(1), matrix)


def test_the_first_layer_the_last_biases_and_norms_are_the_rests() -> None:
    net = network()
    assert [id(p) for p in hidden_matrices(net)] == [id(net[1].weight), id(net[3].weight)]
    optimizer = make_optimizer(partial(Muon, rest=RESTS[0], weight_decay=0.2), net)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 6]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.1, 0.0]
    tokens = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    assert [id(p) for p in hidden_matrices(tokens)] == [id(tokens[1].weight)]


@pytest.mark.parametrize("rest", RESTS)
def test_it_repeats_and_goes_on_from_its_state_to_the_same_bits(rest: Callable[..., Any]) -> None:
    def made(net: nn.Module) -> tuple[Any, Any]:
        optimizer = make_optimizer(partial(Muon, rest=rest, weight_decay=0.1), net)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    results = []
    for _ in range(2):
        net = network()
        optimizer, schedule = made(net)
        results.append((steps(net, optimizer, 6, schedule), weights(net)))
    assert results[0][0] == results[1][0]
    assert results[0][0][-1] < results[0][0][0]

    net = network()
    optimizer, schedule = made(net)
    first = steps(net, optimizer, 3, schedule)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network()
    optimizer, schedule = made(other)
    for part, state in zip((other, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert first + steps(other, optimizer, 3, schedule) == results[0][0]
    assert all(map(torch.equal, weights(other), results[0][1]))
    again = copy.deepcopy(optimizer)
    assert again.rest.param_groups[0] is again.param_groups[1]


@pytest.mark.parametrize("rest", RESTS)
def test_a_schedule_multiplies_the_rates_of_both(rest: Callable[..., Any]) -> None:
    net = network()
    optimizer = make_optimizer(partial(Muon, rest=rest), net)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    steps(net, optimizer, 1, schedule)
    assert rates[0] > 0
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * len(rates)
    before = weights(net)
    steps(net, optimizer, 1)
    assert all(map(torch.equal, weights(net), before))


def test_a_fixed_norm_is_that_of_orthonormal_rows() -> None:
    net = network()
    optimizer = make_optimizer(partial(Muon, rest=RESTS[0], lr=0.0, fixed_norm=True), net)
    steps(net, optimizer, 1)
    assert [float(p.detach().norm()) for p in hidden_matrices(net)] == pytest.approx([8**0.5] * 2, rel=1e-5)


def test_a_step_that_is_not_finite_is_left_out_where_it_is_said_so() -> None:
    net = network()
    optimizer = make_optimizer(partial(Muon, rest=partial(torch.optim.AdamW, lr=1e-2, fused=None), fused=True), net)
    optimizer.found_inf = torch.zeros(())
    steps(net, optimizer, 1)
    before = weights(net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(map(torch.equal, weights(net), before))
    optimizer.found_inf = torch.zeros(())
    steps(net, optimizer, 1)
    assert all(after.isfinite().all() for after in weights(net))
    assert not torch.equal(net[1].weight, before[2])


def test_decoupled_sgd_steps_by_its_rate_whatever_the_momentum() -> None:
    for momentum in (0.5, 0.85):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = DecoupledSGD([{"params": [weight]}], lr=2.0, momentum=momentum)
        for _ in range(200):
            weight.grad = torch.ones(1)
            before = weight.item()
            optimizer.step()
        assert before - weight.item() == pytest.approx(2.0, rel=1e-3)


def test_decoupled_sgd_gives_norms_a_rate_of_their_own_and_the_same_decay() -> None:
    net = network()
    optimizer = make_optimizer(partial(DecoupledSGD, lr=2.0, weight_decay=0.5, norm_lr_scale=8.0), net)
    others, norms = optimizer.param_groups
    assert [id(p) for p in norms["params"]] == [id(net[2].weight), id(net[2].bias)]
    assert norms["lr"] == 8 * others["lr"]
    assert norms["lr"] * norms["weight_decay"] == pytest.approx(others["lr"] * others["weight_decay"])


@pytest.mark.parametrize(("settings", "message"), [({"lr": 0}, "lr=0"), ({"lr": 1, "momentum": 1.0}, "momentum=1.0")])
def test_decoupled_sgd_refuses_what_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoupledSGD([{"params": [nn.Parameter(torch.zeros(1))]}], **settings)
