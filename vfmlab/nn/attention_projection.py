"""Projections of token maps to another width: UniTok's attention projection, and a plain 1x1 convolution.

Both take and give B C H W maps, so that an adapter is built from either by one word of the config. The
attention projection (UniTok, arXiv 2502.20321; used by VFM-VAE, arXiv 2510.18457) changes the width *inside*
an attention layer:

    y = Linear(LN(x)) + Attention(LN(x)),    y = y + GEGLU(LN(y))

with `max(1, larger / smaller)` heads. Narrowing averages the heads, widening concatenates them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import attend

Gelu = Literal["tanh", "erf"]  # the papers' approximation; the exact one, faster on the CPU in bf16
Kind = Literal["attention", "conv"]


def head_count(wide: int, narrow: int) -> int:
    """Heads between two widths: wide // narrow where it divides `wide`, else the next smaller divisor."""
    heads = max(1, wide // narrow)
    while wide % heads:
        heads -= 1
    return heads


class WidthAttention(nn.Module):
    """Multi-head self-attention from width `inputs` to width `outputs`; q and v carry biases, k none.

    inputs > outputs: heads of width inputs / heads are averaged, and pooled to `outputs` where that differs.
    inputs <= outputs: heads are concatenated.
    """

    def __init__(self, inputs: int, outputs: int, heads: int):
        super().__init__()
        self.narrowing = inputs > outputs
        inner = max(inputs, outputs)
        self.heads = heads
        self.outputs = outputs
        self.qkv = nn.Linear(inputs, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner))
        self.v_bias = nn.Parameter(torch.zeros(inner))
        self.out = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:  # B N inputs -> B N outputs
        batch, tokens, _ = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each B heads N d
        y = attend(q, k, v)
        if self.narrowing:
            y = y.mean(dim=1)
            if y.shape[-1] != self.outputs:
                y = F.adaptive_avg_pool1d(y, self.outputs)
        else:
            y = y.transpose(1, 2).reshape(batch, tokens, -1)
        return self.out(y)


class GEGLU(nn.Module):
    """Gated feed-forward with its own LayerNorm in front: out(gelu(gate(x)) * value(x))."""

    def __init__(self, width: int, hidden: int, kind: Gelu):
        super().__init__()
        self.approximate = "tanh" if kind == "tanh" else "none"
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.out(F.gelu(self.gate(x), approximate=self.approximate) * self.value(x))


class AttentionProjectionLayer(nn.Module):
    """One attention projection on tokens: B N inputs -> B N outputs."""

    def __init__(self, inputs: int, outputs: int, heads: int, kind: Gelu):
        super().__init__()
        self.norm_attention = nn.LayerNorm(inputs)
        self.attention = WidthAttention(inputs, outputs, heads)
        self.norm_linear = nn.LayerNorm(inputs)
        self.linear = nn.Linear(inputs, outputs)
        self.norm_mlp = nn.LayerNorm(outputs)
        self.mlp = GEGLU(outputs, 2 * outputs, kind)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm_linear(x)) + self.attention(self.norm_attention(x))
        return y + self.mlp(self.norm_mlp(y))


class AttentionProjection(nn.Module):
    """`layers` attention projections in a row, B C H W -> B C' H W.

    The width changes once: in the last layer when narrowing, in the first when widening, so that the other
    layers work at the larger width. The number of heads follows from the whole projection's widths and is the
    same in all layers.
    """

    def __init__(self, inputs: int, outputs: int, layers: int = 1, kind: Gelu = "tanh"):
        super().__init__()
        wide, heads = max(inputs, outputs), head_count(max(inputs, outputs), min(inputs, outputs))
        widths = [inputs, *[wide] * (layers - 1), outputs]
        self.layers = nn.ModuleList(AttentionProjectionLayer(a, b, heads, kind) for a, b in pairwise(widths))

    @property
    def last_weight(self) -> nn.Parameter:
        return self.layers[-1].mlp.out.weight

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(1, 2).unflatten(2, (height, width))


class ConvProjection(nn.Conv2d):
    """A 1x1 convolution, B C H W -> B C' H W."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 1)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.weight


def projection(how: Kind, inputs: int, outputs: int, layers: int = 1,
               kind: Gelu = "tanh") -> AttentionProjection | ConvProjection:
    """The projection named in a config; `layers` and `kind` concern attention only."""
    if how == "attention":
        return AttentionProjection(inputs, outputs, layers, kind)
    return ConvProjection(inputs, outputs)
