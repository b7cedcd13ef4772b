"""Our architectures, without norms, against torch's own layers and against published parameter counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ablab.models.resnet import ResNet
from ablab.models.rnn import RNN, Cell
from ablab.models.transformer import Attention, Transformer
from ablab.norms import BatchNorm, LayerNorm, NoNorm, RMSNorm

TORCH = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def copy_weights(ours: RNN, theirs: nn.RNNBase) -> None:
    """Into torch's layer from ours: the gates stand in the same order."""
    for i, directions in enumerate(ours.layers):
        for backward, cell in enumerate(directions):
            assert isinstance(cell, Cell)
            suffix = f"_l{i}" + ("_reverse" if backward else "")
            with torch.no_grad():
                for kind, linear in (("ih", cell.input), ("hh", cell.recurrent)):
                    getattr(theirs, f"weight_{kind}{suffix}").copy_(linear.weight)
                    getattr(theirs, f"bias_{kind}{suffix}").copy_(linear.bias)


@pytest.mark.parametrize("cell", list(TORCH))
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_without_a_norm_a_recurrent_network_is_torchs(cell: str, bidirectional: bool, num_layers: int) -> None:
    ours = RNN(
        in_features=5,
        num_classes=3,
        context_length=7,
        norm=NoNorm(),
        cell=cell,
        hidden_size=6,
        num_layers=num_layers,
        bidirectional=bidirectional,
    ).double()
    theirs = TORCH[cell](5, 6, num_layers, batch_first=True, bidirectional=bidirectional).double()
    copy_weights(ours, theirs)
    x = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    _, state = theirs(x)
    hidden = state[0] if cell == "lstm" else state
    directions = 2 if bidirectional else 1
    last = torch.cat(list(hidden[-directions:]), dim=-1)
    expected = ours.head(last)
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    [ours_grad] = torch.autograd.grad(ours(x).square().sum(), x)
    [theirs_grad] = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", list(TORCH))
def test_variable_lengths_are_torchs_packed_sequences(cell: str) -> None:
    ours = RNN(
        in_features=5,
        num_classes=3,
        context_length=7,
        norm=NoNorm(),
        cell=cell,
        hidden_size=6,
        bidirectional=True,
    )
    theirs = TORCH[cell](5, 6, batch_first=True, bidirectional=True)
    copy_weights(ours, theirs)
    x, lengths = torch.randn(4, 7, 5), torch.tensor([7, 3, 5, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    _, state = theirs(packed)
    hidden = state[0] if cell == "lstm" else state
    expected = ours.head(torch.cat(list(hidden), -1))
    torch.testing.assert_close(ours(x, torch.arange(7) < lengths[:, None]), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs_multihead_attention(causal: bool, masked: bool) -> None:
    ours = Attention(12, 3, norm=NoNorm(), causal=causal).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    valid = (torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]) if masked else None
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    padding = None if valid is None else ~valid
    expected, _ = theirs(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=True)
    rows = torch.ones(4, 7, dtype=torch.bool) if valid is None else valid
    torch.testing.assert_close(ours(x, valid)[rows], expected[rows], rtol=1e-10, atol=1e-12)


def test_attention_is_the_softmax_of_scaled_products() -> None:
    ours = Attention(12, 3, norm=NoNorm(), causal=False).double()
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in ours.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1)
    expected = ours.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_is_torchs_transformer_encoder(norm_first: bool) -> None:
    ours = Transformer(
        in_features=5,
        num_classes=3,
        context_length=7,
        norm=LayerNorm(),
        embed_dim=12,
        num_heads=3,
        norm_first=norm_first,
    )
    layer = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(12) if norm_first else None, enable_nested_tensor=False)
    names = {
        "self_attn.in_proj_": "attention.qkv.",
        "self_attn.out_proj.": "attention.proj.",
        "linear1.": "expand.",
        "linear2.": "contract.",
        "layers.": "blocks.",
    }
    state = ours.state_dict()
    for name, parameter in theirs.named_parameters():
        mine = name
        for old, new in names.items():
            mine = mine.replace(old, new)
        with torch.no_grad():
            parameter.copy_(state[mine])
    x = torch.randn(4, 7, 5)
    assert ours.class_token is not None
    embedded = torch.cat([ours.class_token.expand(4, 1, 12), ours.embed(x) + ours.positions.weight], 1)
    expected = ours.head(theirs(embedded)[:, 0])
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)],
)
def test_imagenet_resnets_have_torchvisions_parameter_counts(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = ResNet(3, 1000, norm=BatchNorm(), depth=depth, style="imagenet", width=64)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_cifar_resnets_have_the_papers_parameter_counts(depth: int, millions: float) -> None:
    with torch.device("meta"):
        model = ResNet(3, 10, norm=BatchNorm(), depth=depth)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_images_are_halved_at_each_stage_but_the_first() -> None:
    seen = []
    model = ResNet(3, 10, norm=BatchNorm(), depth=14)
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: seen.append(tuple(output.shape[1:])))
    model(torch.randn(2, 3, 32, 32))
    assert seen == [(16, 32, 32)] * 2 + [(32, 16, 16)] * 2 + [(64, 8, 8)] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(3, 10, norm=BatchNorm(), depth=21), "depth=21: .* 6n \\+ 2 .* the nearest is 20"),
        (
            lambda: ResNet(3, 10, norm=BatchNorm(), depth=20, style="imagenet"),
            "depth=20: .* 18, 34, 50, 101, 152",
        ),
        (
            lambda: Transformer(in_features=8, num_classes=2, context_length=4, norm=LayerNorm(), embed_dim=30),
            "embed_dim=30 is not a multiple of num_heads=4",
        ),
        (lambda: Transformer(context_length=4, norm=LayerNorm()), "give one of them"),
        (
            lambda: Transformer(in_features=8, context_length=4, norm=LayerNorm()),
            "num_classes=None: it is needed without vocab_size",
        ),
        (lambda: RNN(in_features=8, vocab_size=9, context_length=4, norm=NoNorm()), "give one of them"),
        (
            lambda: RNN(in_features=8, context_length=4, norm=NoNorm()),
            "num_classes=None: it is needed without vocab_size",
        ),
        (
            lambda: RNN(vocab_size=8, context_length=4, norm=NoNorm(), bidirectional=True),
            "must not read it from behind; set model.bidirectional=false",
        ),
        (
            lambda: RNN(in_features=8, num_classes=2, context_length=4, norm=NoNorm())(torch.zeros(1, 5, 8)),
            "a sequence of 5 steps is longer than context_length=4",
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(make: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("qk_norm", [RMSNorm(), LayerNorm()], ids=["rmsnorm", "layernorm"])
def test_normed_queries_and_keys_are_the_formula(qk_norm: RMSNorm | LayerNorm) -> None:
    attention = Attention(12, 3, norm=NoNorm(), causal=False, qk_norm=qk_norm).double()
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    torchs = torch.nn.functional.rms_norm if isinstance(qk_norm, RMSNorm) else torch.nn.functional.layer_norm
    normed = []
    for tensor, layer in ((q, attention.norm_q), (k, attention.norm_k)):
        scaled = torchs(tensor, (4,), eps=1e-5) * layer.weight
        normed.append(scaled if layer.bias is None else scaled + layer.bias)
    weights = (normed[0] @ normed[1].transpose(-1, -2) / 2).softmax(-1)
    expected = attention.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)
    bound = attention.qkv.weight * 1000  # however large queries and keys are, what attends to what stays
    with torch.no_grad():
        attention.qkv.weight[:24] = bound[:24]
        attention.qkv.bias[:24] *= 1000
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-4)
