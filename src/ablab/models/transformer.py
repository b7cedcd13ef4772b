"""Transformers: an encoder for sequence classification and a causal decoder for language modelling."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablab.models.checks import check_positive, check_probabilities
from ablab.models.interface import NormFactory
from ablab.models.sequences import num_outputs, zero_padding


class Transformer(nn.Module):
    """A transformer for sequence classification or language modelling.

    Reads tokens if `vocab_size` is given, else vectors of `in_features`. With `num_classes`, it is an encoder that
    classifies the sequence from a prepended class token (a mean over steps would be constant after instance norm);
    without, a causal decoder that predicts the next token at every step.

    Args:
        in_features: number of features per step.
        vocab_size: vocabulary size.
        num_classes: number of classes.
        context_length: length of the longest sequence, and number of learned position embeddings.
        norm: factory of the norm layers.
        embed_dim: model dimension; a multiple of `num_heads`.
        num_heads: number of attention heads.
        num_layers: number of blocks.
        mlp_ratio: hidden features of a block's MLP, as a multiple of `embed_dim`.
        norm_first: norms before attention and MLP (pre-norm) instead of after the residual sum (post-norm).
        qk_norm: factory of the norms of queries and keys, within each head; None for no such norms.
        dropout: dropout probability after the embedding, attention and MLP.

    Shape:
        vectors `(N, L, in_features)` or tokens `(N, L)`, `valid` `(N, L)` True for real steps
        -> class logits `(N, num_classes)` or token logits `(N, L, vocab_size)`

    Raises:
        ValueError: the sizes are inconsistent, or a sequence is longer than `context_length`.

    References:
        Vaswani et al. 2017, https://arxiv.org/abs/1706.03762
        Devlin et al. 2018 (class token), https://arxiv.org/abs/1810.04805
        Xiong et al. 2020 (pre-norm), https://arxiv.org/abs/2002.04745
        Dehghani et al. 2023 (query-key norm), https://arxiv.org/abs/2302.05442
    """

    takes: ClassVar = ("sequences", "text")
    weight_decay: ClassVar = ()  # the class token is not decayed, see ablab.optim.groups

    def __init__(
        self,
        *,
        in_features: int | None = None,
        vocab_size: int | None = None,
        num_classes: int | None = None,
        context_length: int,
        norm: NormFactory,
        embed_dim: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        mlp_ratio: float = 4.0,
        norm_first: bool = True,
        qk_norm: NormFactory | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, num_heads=num_heads, num_layers=num_layers)
        check_probabilities(dropout=dropout)
        if not 1 <= mlp_ratio * embed_dim < math.inf:
            raise ValueError(f"mlp_ratio={mlp_ratio}: the perceptron of a block needs at least one hidden feature")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not a multiple of num_heads={num_heads}")
        outputs = num_outputs(in_features, vocab_size, num_classes)
        self.causal = num_classes is None
        self.context_length = context_length
        self.embed = embedding(in_features, vocab_size, embed_dim, norm)
        self.positions = nn.Embedding(context_length, embed_dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.class_token = None if self.causal else nn.Parameter(torch.empty(embed_dim).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        # scaled by the number of residual branches, so that the variance does not grow with depth (Radford et al. 2019)
        branch_std = 0.02 / math.sqrt(2 * num_layers)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, norm_first, dropout, self.causal, branch_std, norm, qk_norm)
            for _ in range(num_layers)
        )
        # post-norm blocks already end in a norm
        self.norm = norm(embed_dim, "sequence", causal=self.causal) if norm_first else None
        self.head = linear(embed_dim, outputs, norm)

    def forward(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        length = inputs.shape[1]
        if length > self.context_length:
            raise ValueError(f"a sequence of {length} steps is longer than context_length={self.context_length}")
        x = self.embed(zero_padding(inputs, valid)) + self.positions.weight[:length]
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
            valid = None if valid is None else F.pad(valid, (1, 0), value=True)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, valid)
        if self.norm is not None:
            x = self.norm(x, valid)
        return self.head(x) if self.causal else self.head(x[:, 0])


class Block(nn.Module):
    """A transformer block: attention and MLP with residual connections, pre-norm or post-norm."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        norm_first: bool,
        dropout: float,
        causal: bool,
        branch_std: float,
        norm: NormFactory,
        qk_norm: NormFactory | None,
    ) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.norm_first = norm_first
        self.norm1 = norm(embed_dim, "sequence", causal=causal)
        self.attention = Attention(
            embed_dim, num_heads, norm=norm, causal=causal, qk_norm=qk_norm, branch_std=branch_std
        )
        self.norm2 = norm(embed_dim, "sequence", causal=causal)
        self.expand = linear(embed_dim, hidden, norm)
        self.contract = linear(hidden, embed_dim, norm, std=branch_std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self.attention(self.norm1(x, valid), valid))
            return x + self.dropout(self.mlp(self.norm2(x, valid)))
        x = self.norm1(x + self.dropout(self.attention(x, valid)), valid)
        return self.norm2(x + self.dropout(self.mlp(x)), valid)

    def mlp(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / sqrt(head_dim)) v in each head, then an output projection.

    With `qk_norm`, q and k are normalized within each head of each step; all heads share one gain.

    Shape:
        `(N, L, embed_dim)`, `valid` `(N, L)` -> `(N, L, embed_dim)`
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        norm: NormFactory,
        causal: bool,
        qk_norm: NormFactory | None = None,
        branch_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = linear(embed_dim, 3 * embed_dim, norm)
        self.proj = linear(embed_dim, embed_dim, norm, std=branch_std)
        head_dim = embed_dim // num_heads
        self.norm_q = nn.Identity() if qk_norm is None else qk_norm(head_dim, "heads")
        self.norm_k = nn.Identity() if qk_norm is None else qk_norm(head_dim, "heads")

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        # (N, L, 3 C) -> q, k, v of (N, heads, L, C / heads)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q), self.norm_k(k)
        mask = None
        if valid is not None:
            mask = valid[:, None, None, :]
            if self.causal:
                steps = x.shape[1]
                mask = mask & torch.ones(steps, steps, dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return self.proj(y.transpose(1, 2).flatten(2))


def linear(in_features: int, out_features: int, norm: NormFactory, std: float = 0.02) -> nn.Module:
    """Return a linear layer with GPT-2's initialization."""
    layer = nn.Linear(in_features, out_features)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return norm.wrap(layer)


def embedding(in_features: int | None, vocab_size: int | None, embed_dim: int, norm: NormFactory) -> nn.Module:
    """Return an embedding table for tokens, or a linear layer for vectors."""
    if vocab_size is not None:
        table = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(table.weight, std=0.02)
        return table
    assert in_features is not None
    return linear(in_features, embed_dim, norm)
