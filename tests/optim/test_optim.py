"""Every parameter in exactly one group, and schedules with the shape they promise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tests.pairs import in_turn
from torch import nn

from ablab.lab.config.build import build
from ablab.optim import schedules
from ablab.optim.groups import parameter_groups
from ablab.optim.optimizer import make_optimizer

GROUPED = [("resnet", "images"), ("unet", "masks"), ("transformer", "sequences"), ("mlp", "vectors"), ("rnn", "text")]


@pytest.mark.parametrize(("model", "kind", "norm"), in_turn(GROUPED))
def test_every_parameter_is_in_exactly_one_group(
    config: Callable[..., DictConfig], batch: Callable[..., Any], model: str, kind: str, norm: str
) -> None:
    _, sizes = batch(kind)
    net = build(config(f"model={model}").model, norm=build(config(f"norm={norm}").norm), **sizes)
    decayed, kept = ({id(p) for p in group["params"]} for group in parameter_groups(net, 0.1))
    assert not decayed & kept
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert decayed | kept == {id(p) for p in trained.values()}
    for name, parameter in trained.items():
        weight = name.endswith((".weight", "original", "original1")) and not any(
            part in name for part in ("norm", "embed.weight", "positions", "shortcut.1")
        )
        # the embedding of vectors is a linear map, that of tokens a table
        weight |= name == "embed.weight" and kind == "sequences"
        assert (id(parameter) in decayed) == weight, name


def test_of_a_module_that_does_not_say_what_decays_matrices_do(capsys: pytest.CaptureFixture[str]) -> None:
    class Silent(nn.Module):
        weight_decay: Any = 0.5  # somebody's own setting

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.map = nn.Parameter(torch.ones(3, 2))

    class Outspoken(Silent):
        weight_decay = ("scale",)

    [decayed, kept] = parameter_groups(nn.Sequential(Silent(), Silent()), 0.1)
    assert [[p.dim() for p in group["params"]] for group in (decayed, kept)] == [[2, 2], [1, 1]]
    assert capsys.readouterr().err == (
        "weight decay: 0 (Silent) does not say which of its parameters decay, so matrices do (map), vectors and "
        'scalars do not; a class attribute decides it, weight_decay = ("weight",)\n'
    )
    [decayed, kept] = parameter_groups(nn.Sequential(Outspoken()), 0.1)
    assert [[p.dim() for p in group["params"]] for group in (decayed, kept)] == [[1], [2]]
    assert [decayed["weight_decay"], kept["weight_decay"]] == [0.1, 0.0]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("module", "decaying"),
    [
        (nn.LSTM(3, 4, proj_size=2), {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (
            nn.GRU(3, 4, bidirectional=True),
            {f"weight_{part}_l0{end}" for part in ("ih", "hh") for end in ("", "_reverse")},
        ),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight", "out_proj.weight"}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True),
            {*(f"{k}_proj_weight" for k in "qkv"), "out_proj.weight"},
        ),
        (nn.EmbeddingBag(5, 3), set()),
        (
            nn.TransformerEncoderLayer(4, 2),
            {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_torchs_own_layers_decay_by_their_weights(
    module: nn.Module, decaying: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, _ = parameter_groups(module, 0.1)
    assert {names[id(parameter)] for parameter in decayed["params"]} == decaying
    assert capsys.readouterr().err == ""


def test_a_weight_shared_with_a_module_that_does_not_decay_it_is_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["table"].weight
    with pytest.raises(ValueError, match=r"table.weight: shared by two modules of which only one decays it"):
        parameter_groups(model, 0.1)


def test_a_negative_hyperparameter_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum=-1: a number is needed that is finite and not negative"):
        make_optimizer(partial(torch.optim.SGD, lr=0.1, momentum=-1), nn.Linear(2, 2))


def rates(schedule: Callable[..., Any], steps: int = 100, **settings: Any) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.5, momentum=0.9)
    scheduler = schedule(optimizer, steps, **settings)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_constant_is_constant_after_its_warmup() -> None:
    assert rates(schedules.constant) == [0.5] * 100
    climbing = rates(schedules.constant, warmup_steps=4)
    assert climbing[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert climbing[4:] == [0.5] * 96


def test_cosine_climbs_and_then_falls_to_its_final_ratio() -> None:
    seen = rates(schedules.cosine, warmup_steps=10, final_ratio=0.1)
    assert seen[10] == 0.5
    assert seen[:11] == sorted(seen[:11])
    assert seen[10:] == sorted(seen[10:], reverse=True)
    assert seen[-1] == pytest.approx(0.05, abs=1e-3)
    assert seen[55] == pytest.approx(0.5 * 0.55)


def test_multistep_falls_at_its_shares_of_the_run() -> None:
    seen = rates(schedules.multistep, milestones=[0.5, 0.75], gamma=0.1)
    assert seen == pytest.approx([0.5] * 50 + [0.05] * 25 + [0.005] * 25)


def test_one_cycle_starts_low_and_peaks_at_lr() -> None:
    seen = rates(schedules.one_cycle, warmup_ratio=0.3, initial_ratio=0.1)
    assert seen[0] == pytest.approx(0.05)
    assert max(seen) == pytest.approx(0.5, abs=1e-3)
    assert seen.index(max(seen)) in (29, 30)


def test_triangular_climbs_to_its_peak_and_falls_to_its_end() -> None:
    seen = rates(schedules.triangular, peak=0.2, initial_ratio=0.5, final_ratio=0.1)
    assert seen[0] == 0.25
    assert seen[20] == 0.5
    assert seen[10] == pytest.approx(0.375)
    assert seen[-1] == pytest.approx(0.05 + 0.45 / 80)
    assert rates(schedules.triangular, peak=0.0, final_ratio=0.0)[::50] == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (schedules.triangular, {"peak": 1}, "peak=1"),
        (schedules.triangular, {"final_ratio": 2}, "final_ratio=2"),
        (schedules.cosine, {"warmup_steps": -1}, "warmup_steps=-1"),
        (schedules.constant, {"warmup_steps": -1}, "warmup_steps=-1"),
        (schedules.multistep, {"milestones": [60]}, r"milestones=\[60\]: they are shares of the run"),
        (schedules.multistep, {"gamma": 0}, "gamma=0"),
        (schedules.cosine, {"final_ratio": -1}, "final_ratio=-1"),
        (schedules.one_cycle, {"warmup_ratio": 2}, "warmup_ratio=2"),
        (schedules.one_cycle, {"initial_ratio": 0}, "initial_ratio=0"),
    ],
)
def test_a_schedule_refuses_what_makes_no_sense(schedule: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates(schedule, **settings)


def test_every_optimizer_lowers_the_loss_and_goes_on_from_its_state_to_the_same_bits(
    config: Callable[..., DictConfig], optimizer_choice: str
) -> None:
    """What a run relies on, of those that somebody adds, too; a closure is called once, with gradients."""

    def network() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        node = config(f"optimizer={optimizer_choice}").optimizer
        node.lr *= 0.01  # for so small a network, and without a warmup
        optimizer = make_optimizer(build(node), net)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return net, optimizer

    x, y = torch.randn(64, 8), torch.randint(4, (64,))

    def steps(net: nn.Module, optimizer: Any, number: int) -> list[float]:
        losses: list[float] = []

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found = nn.functional.cross_entropy(net(x), y)
            found.backward()
            losses.append(found.item())
            return found

        for _ in range(number):
            optimizer.step(loss)
        assert len(losses) == number
        return losses

    net, optimizer = network()
    losses = steps(net, optimizer, 20)
    assert losses[-1] < losses[0]
    other, again = network()
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(net, optimizer, 3) == steps(other, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scheduler.warmup_steps=4"], ["scheduler.warmup_steps=4: the training has 4 steps, and never reaches"]),
        (["scheduler.warmup_steps=3"], []),
        (["scheduler=constant", "scheduler.warmup_steps=9"], ["scheduler.warmup_steps=9: the training has 4 steps"]),
        (["optimizer=schedulefree_sgd"], ["optimizer.warmup_steps=20: the training has 4 steps"]),
        (
            ["scheduler.warmup_steps=0", "+callbacks.late._target_=ablab.callbacks.lookahead.Lookahead"],
            [],  # its own default is not in the config
        ),
        (
            [
                "scheduler.warmup_steps=0",
                "+callbacks.late={_target_: ablab.callbacks.lookahead.Lookahead, start_epoch: 2}",
            ],
            ["callbacks.late.start_epoch=2: the training has 2 epochs, counted from 0, so that it never acts"],
        ),
        (["trainer.max_steps=1", "scheduler.warmup_steps=100"], []),  # a trial
        (["trainer.limit_train_batches=1", "scheduler.warmup_steps=100"], []),
    ],
)
def test_what_a_training_is_too_short_for_is_said_once(
    config: Callable[..., Any], capsys: pytest.CaptureFixture[str], words: list[str], said: list[str]
) -> None:
    from ablab.lab.train import build_and_check

    build_and_check(config("trainer=cpu", "logger=csv", "trainer.max_epochs=2", "data.batch_size=574", *words))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == len(said)
    assert all(text in line for text, line in zip(said, lines, strict=True))
