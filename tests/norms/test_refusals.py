"""What is refused, word for word: the value, the place and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ablab.errors import ConfigError
from ablab.models.transformer import Transformer
from ablab.norms import (
    BatchNorm,
    DyT,
    EvoNormB0,
    FilterResponseNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    NoNorm,
    Norm,
    NormLayer,
    SpectralNorm,
    WeightNorm,
    WeightStandardization,
    builtin_norms,
    collect_refusals,
    find_norm_problems,
    norm_layers,
)


def message(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        act()
    return str(error.value)


# When a layer is asked for ----------------------------------------------------------------------------------------


def test_groups_that_do_not_divide_are_refused_with_the_nearest_that_do() -> None:
    assert message(lambda: GroupNorm(num_groups=32)(48, "image")) == (
        "num_groups=32 does not divide 48 features; divisors are 1 2 3 4 6 8 12 16 24 48; set norm.num_groups=24"
    )
    assert message(lambda: GroupNorm(num_groups=None, group_size=64)(48, "sequence")) == (
        "group_size=64 does not divide 48 features; divisors are 1 2 3 4 6 8 12 16 24 48; set norm.group_size=48"
    )


def test_statistics_over_time_are_refused_in_causal_models() -> None:
    assert message(lambda: BatchNorm()(8, "sequence", causal=True)) == (
        "a mean and variance over the batch and all positions would leak the future into a causal model; "
        "choose a norm whose statistics stay within a step"
    )
    assert message(lambda: GroupNorm(num_groups=8)(16, "sequence", causal=True)) == (
        "a mean and variance over all positions and a group of features would leak the future into a causal model; "
        "set norm.sequence_scope=position"
    )
    GroupNorm(num_groups=8, sequence_scope="position")(16, "sequence", causal=True)
    BatchNorm(frozen=True)(16, "sequence", causal=True)
    with pytest.raises(ValueError, match="would leak the future"):  # and so when the model is built
        Transformer(vocab_size=10, context_length=8, norm=BatchNorm())


def test_a_single_value_for_each_statistic_is_refused() -> None:
    assert message(lambda: InstanceNorm().recurrent(8, "cell", num_steps=3)) == (
        "inside a recurrence, where a step stands alone, the mean and variance of each feature would be taken over a "
        "single value, and the output would not depend on how large it is; choose a norm over several features or over "
        "the batch"
    )
    assert message(lambda: GroupNorm(num_groups=8, sequence_scope="position")(8, "sequence")) == (
        "the mean and variance of each feature would be taken over a single value, and the output would not depend on "
        "how large it is; choose a norm over several features or over the batch"
    )
    assert message(lambda: InstanceNorm()(8, "vector")) == (
        "in a vector the mean and variance of each feature would be taken over a single value, and the output would "
        "not depend on how large it is; choose a norm over several features or over the batch"
    )
    for norm in (FilterResponseNorm(), EvoNormB0(), GroupNorm(num_groups=8)):
        assert message(lambda: norm(8, "vector")).startswith("in a vector the ")  # noqa: B023
    assert "single value" in message(lambda: FilterResponseNorm().recurrent(8, "input", num_steps=3))
    assert "single value" in message(lambda: LayerNorm()(1, "sequence"))
    EvoNormB0().recurrent(8, "input", num_steps=3)  # where no nonlinearity follows, it takes the batch's alone


def test_heads_are_normalized_on_their_own() -> None:
    assert message(lambda: BatchNorm()(8, "heads")) == (
        "queries and keys are normalized within one head of one step, and not by mean and variance over the batch and "
        "all positions; choose a norm over all features"
    )


def test_a_layout_or_a_site_that_there_is_not() -> None:
    assert message(lambda: BatchNorm()(8, "tokens")) == (
        "layout=tokens: there are image, sequence, heads, vector; inside a recurrence, Norm.recurrent"
    )
    assert message(lambda: BatchNorm().recurrent(8, "output", num_steps=2)) == (
        "site=output: there are input, recurrent, cell"
    )


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: BatchNorm(momentum=0), "momentum=0: a share of the newest batch is needed, more than 0 and at most 1"),
        (lambda: LayerNorm(eps=0), "eps=0: the variance needs something added before the root, for example 1e-5"),
        (lambda: GroupNorm(num_groups=0), "num_groups=0: at least one group is needed"),
        (lambda: GroupNorm(num_groups=None, group_size=0), "group_size=0: a group has at least one feature"),
        (
            lambda: GroupNorm(num_groups=4, group_size=4),
            "num_groups=4, group_size=4: give one of them and set the other to null",
        ),
        (
            GroupNorm,
            "num_groups=None, group_size=None: give one of them and set the other to null",
        ),
        (
            lambda: BatchNorm(ghost_batch_size=0),
            "ghost_batch_size=0: at least one sample is needed, or null for all",
        ),
        (
            lambda: BatchNorm(r_max=0.5),
            "r_max=0.5, d_max=0.0: bounds of at least 1 and 0 are needed; those are no renorm",
        ),
        (
            lambda: BatchNorm(renorm_start=5, renorm_end=2),
            "renorm_start=5, renorm_end=2: steps from 0 on, in this order",
        ),
        (
            lambda: BatchNorm(sync=True, ghost_batch_size=4),
            "ghost_batch_size=4, sync=true: one narrows the batch that is seen, the other widens it; set one of them",
        ),
        (
            lambda: BatchNorm(mean_only=True, r_max=3),
            "mean_only=true, r_max=3, d_max=0.0: renorm corrects a division; set one of them",
        ),
        (
            lambda: BatchNorm(frozen=True, sync=True),
            "frozen=true: no batch is looked at, so sync, ghost_batch_size and renorm must be off",
        ),
        (
            lambda: LayerNorm(sequence_scope="Position"),
            "sequence_scope=Position: there are sample, position",
        ),
        (lambda: DyT(alpha=0), "alpha=0: more than 0 is needed, for example 0.5"),
        (
            lambda: WeightStandardization(eps=0),
            "eps=0: the variance needs something added before the root, for example 1e-5",
        ),
        (lambda: SpectralNorm(num_iterations=0), "num_iterations=0: at least one is needed"),
    ],
)
def test_settings_that_make_no_sense(make: Callable[[], Any], expected: str) -> None:
    assert message(make) == expected


# When an input comes ----------------------------------------------------------------------------------------------


def test_a_batch_of_one_with_batch_norm() -> None:
    expected = (
        "an input of shape (1, 8, 1, 1) leaves a single value for each mean and variance over the batch and all "
        "positions, and the output would not depend on how large it is; raise data.batch_size (and drop a last batch "
        "of one sample), or choose a norm that does not look at the batch"
    )
    layer = BatchNorm()(8, "image")
    assert message(lambda: layer(torch.randn(1, 8, 1, 1))) == expected
    layer(torch.randn(1, 8, 2, 1))  # two values are enough
    layer.eval()(torch.randn(1, 8, 1, 1))  # and evaluation looks at no batch
    cell = BatchNorm().recurrent(8, "cell", num_steps=3)
    vector = BatchNorm()(8, "vector")
    assert "(1, 8) leaves a single value for each mean and variance over the batch," in message(
        lambda: vector(torch.randn(1, 8))
    )
    assert "(1, 8) leaves a single value for each mean and variance over the batch," in message(
        lambda: cell(torch.randn(1, 8), step=0)
    )


def test_a_last_ghost_batch_of_one_sample() -> None:
    layer = BatchNorm(ghost_batch_size=4)(8, "image")
    assert message(lambda: layer(torch.randn(9, 8, 1, 1))) == (
        "an input of shape (9, 8, 1, 1) leaves a single value for each mean and variance over each ghost batch and all "
        "positions, and the output would not depend on how large it is; raise data.batch_size (and drop a last batch "
        "of one sample), or choose a norm that does not look at the batch"
    )


def test_instance_norm_of_a_single_pixel() -> None:
    layer = InstanceNorm()(8, "image")
    expected = (
        "an input of shape (4, 8, 1, 1) leaves a single value for each mean and variance over all positions, and the "
        "output would not depend on how large it is; use larger inputs, fewer groups, or a norm over more values"
    )
    for mode in (True, False):
        assert message(lambda: layer.train(mode)(torch.randn(4, 8, 1, 1))) == expected  # noqa: B023


def test_features_in_another_dimension() -> None:
    assert message(lambda: LayerNorm()(8, "sequence")(torch.randn(4, 7, 5))) == (
        "a norm of 8 features in the layout sequence got a tensor of shape (4, 7, 5); dimension -1 must hold the "
        "features: give them there, or build the norm for another layout"
    )
    assert "dimension 1 must hold the features" in message(lambda: BatchNorm()(8, "image")(torch.randn(4, 7, 8)))
    assert "in the layout sequence" in message(lambda: BatchNorm()(8, "sequence")(torch.randn(7, 8)))


def test_a_step_beyond_the_longest_sequence() -> None:
    assert message(lambda: BatchNorm().recurrent(8, "input", num_steps=3)(torch.randn(2, 8), step=3)) == (
        "batch norm in a recurrence keeps statistics for 3 steps, and step 4 was asked for"
    )


class Maskless(Norm):
    """A norm of a fork that does not know padding."""

    supports_masks = False

    def statistics(self, layout: Any) -> tuple[Any, ...]:
        return ()

    def layer(self, num_features: int, layout: Any, **rest: Any) -> NormLayer:
        return Nothing(self, num_features, layout)


class Nothing(NormLayer):
    def normalize(self, x: Tensor, valid: Tensor | None, step: int | None) -> Tensor:
        return x


def test_a_mask_that_is_not_supported_or_does_not_belong() -> None:
    x, valid = torch.randn(4, 7, 8), torch.ones(4, 7, dtype=torch.bool)
    layer = Maskless()(8, "sequence")
    layer(x)
    assert message(lambda: layer(x, valid)) == (
        "this norm takes padding for values, and the batch has padding; choose a norm that honours masks, or data "
        "whose sequences are equally long"
    )
    assert message(lambda: LayerNorm()(8, "sequence")(x, valid[:, :5])) == (
        "a mask of shape (4, 5) does not belong to an input of shape (4, 7, 8); give (4, 7)"
    )
    assert "the layout vector has none" in message(lambda: LayerNorm()(8, "vector")(torch.randn(4, 8), valid))
    assert message(lambda: LayerNorm()(8, "image")(torch.randn(4, 8, 7), valid)) == (
        "a mask marks the real steps of a sequence, and the layout image has none; give valid=None"
    )


# Weights ----------------------------------------------------------------------------------------------------------


def test_weight_norm_of_a_weight_without_length() -> None:
    linear = nn.Linear(3, 2)
    nn.init.zeros_(linear.weight)
    assert message(lambda: WeightNorm()(linear)) == (
        "weight norm of Linear(in_features=3, out_features=2, bias=True): a weight of length 0 has no direction; "
        "initialize it with other values, and make the layer zero by Norm.zero_init, which zeroes g"
    )


class Tied(nn.Module):
    """Embedding and head share their weight, before the head is wrapped."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = norm(8, "sequence")
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        norm.wrap(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


def test_tied_weights_under_weight_norm() -> None:
    norm = LayerNorm(weight=WeightNorm())
    model, tokens = Tied(norm), torch.zeros(2, 3, dtype=torch.long)
    assert find_norm_problems(model, norm, lambda: model(tokens)) == {
        "weight norm makes parameters of its own out of the weight that is shared with embed.weight, and so unties "
        "them; share none, or choose norm/weight=none": ["head"]
    }
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    norm.wrap(first)
    assert message(lambda: norm.wrap(second)) == (
        "weight norm of Linear(in_features=8, out_features=8, bias=True): its weight is shared with a module that was "
        "reparametrized before, and each would get parameters of its own; share none, or choose norm/weight=none"
    )
    plain = LayerNorm()
    tied = Tied(plain)
    assert find_norm_problems(tied, plain, lambda: tied(tokens)) == {}
    assert tied.head.weight is tied.embed.weight
    head = norm.wrap(nn.Linear(8, 10))

    with pytest.raises(KeyError, match="attribute 'weight' already exists"):  # tying afterwards: torch refuses
        head.weight = model.embed.weight


def test_a_reparametrization_that_finds_nothing_to_do() -> None:
    norm = LayerNorm(weight=WeightStandardization())
    model = nn.Sequential(norm.wrap(nn.Linear(4, 8)), norm(8, "sequence"))
    assert find_norm_problems(model, norm, lambda: model(torch.randn(2, 3, 4))) == {
        "norm/weight: weight standardization is for convolutions, and this model has none; choose norm/weight=none": [
            "Sequential"
        ]
    }


def test_a_grouped_transposed_convolution() -> None:
    assert message(lambda: WeightNorm()(nn.ConvTranspose1d(4, 4, 3, groups=2))) == (
        "ConvTranspose1d(4, 4, kernel_size=(3,), stride=(1,), groups=2): the weight of a grouped transposed "
        "convolution has no dimension for its outputs; use groups=1, or leave it unwrapped"
    )


# All of a model's problems at once --------------------------------------------------------------------------------


def test_all_problems_are_found_together_with_their_places_and_the_model_is_left_as_it_was() -> None:
    norm = GroupNorm(num_groups=8)
    with collect_refusals():
        model = nn.Sequential(
            norm(12, "image"), nn.Conv2d(12, 8, 3), norm(8, "image"), nn.Conv2d(8, 8, 3), norm(8, "image")
        )
    x = torch.randn(4, 12, 5, 5)
    found = find_norm_problems(model.to("meta"), norm, lambda: model(x.to("meta")))
    assert list(found.values()) == [["0"], ["4"]]
    first, second = found
    assert first == "num_groups=8 does not divide 12 features; divisors are 1 2 3 4 6 12; set norm.num_groups=6"
    assert second.startswith("an input of shape (4, 8, 1, 1) leaves a single value")
    with pytest.raises(ValueError, match="does not divide"):
        model(x)


# A norm that is nowhere ------------------------------------------------------------------------------------------


class KeepsItsOwn(nn.Module):
    """A network that takes a norm and builds torch's."""

    takes = ("images",)

    def __init__(self, *, norm: Norm, in_channels: int, num_classes: int, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


class LinearProbe(nn.Module):
    """A linear map of the pixels, which has no norm at all."""

    takes = ("images",)

    def __init__(self, *, norm: Norm, in_channels: int, num_classes: int, **settings: Any) -> None:
        super().__init__()
        self.head = norm.wrap(nn.Linear(in_channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class OwnLayer(Norm):
    """A norm whose layer is a module of any class."""

    def statistics(self, layout: str) -> tuple[()]:
        return ()

    def layer(self, *arguments: Any, **settings: Any) -> nn.Module:
        return nn.Tanh()


class UsesIt(KeepsItsOwn):
    """The same with its norm."""

    def __init__(self, *, norm: Norm, in_channels: int, num_classes: int, **settings: Any) -> None:
        super().__init__(norm=norm, in_channels=in_channels, num_classes=num_classes)
        self.bn = norm(8, "image")  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("kind", "reason", "names"),
    [(KeepsItsOwn, "it keeps BatchNorm2d;", ["bn"]), (LinearProbe, "it has none;", ["LinearProbe"])],
)
def test_a_norm_that_would_be_nowhere_is_a_problem_and_none_is_not(kind: type, reason: str, names: list[str]) -> None:
    norms: tuple[Norm, ...] = (GroupNorm(num_groups=2), BatchNorm(), DyT(), NoNorm())
    for norm in norms:
        model = kind(norm=norm, in_channels=1, num_classes=3)
        found = find_norm_problems(model, norm, lambda model=model: model(torch.zeros(2, 1, 8, 8)))  # type: ignore[misc]
        if isinstance(norm, NoNorm):
            assert not found
            continue
        [(said, places_of)] = found.items()
        assert said.startswith(f"{type(norm).__name__} is in no place of this model: {reason} choose norm=none, or ")
        assert places_of == names


def test_a_run_refuses_a_norm_that_its_model_does_not_use_and_says_which_it_keeps(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    model = "model._target_=tests.norms.test_refusals.KeepsItsOwn"
    with pytest.raises(ConfigError, match=r"norm: GroupNorm is in no place .*\(at bn of the model\)"):
        run(model, "norm=groupnorm")
    assert not list(tmp_path.glob("runs/*"))
    printed = run(model, "norm=none").printed
    assert "norm: NoNorm()\n  the model's own BatchNorm2d, at 1 places: bn\n" in printed


def test_a_norm_of_any_class_has_its_places() -> None:
    model = UsesIt(norm=OwnLayer(), in_channels=1, num_classes=3)
    assert list(norm_layers(model)) == ["bn"]
    assert not builtin_norms(model)
    assert not find_norm_problems(model, OwnLayer(), lambda: model(torch.zeros(2, 1, 8, 8)))
