"""Transformer blocks without biases and without weights in their norms, as GAE's networks are built of (arXiv
2603.10365): only matrices learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import SelfAttention
from vfmlab.nn.rope import positions

EPS = 1e-6


def rms(x: Tensor) -> Tensor:
    """x / rms(x) over the last axis, no weights, in fp32, returned in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], None, EPS).to(x.dtype)


def hidden_width(width: int) -> int:
    """Of SwiGLU: two thirds of 4 x width, rounded up to a multiple of 256."""
    return -(-int(width * 4 * 2 / 3) // 256) * 256


def attention(width: int, heads: int) -> SelfAttention:
    """Self-attention of B N D; queries and keys are normalised per head."""
    return SelfAttention(width, heads, qkv_bias=False, bias=False, qk_norm=lambda _: rms)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1 x) * gate x)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = hidden_width(width)
        self.fc1, self.gate = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.gate(x))


class PlainBlock(nn.Module):
    """x + attention(rms x), then x + SwiGLU(rms x); tokens B N D."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn, self.mlp = attention(width, heads), SwiGLU(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(rms(x))
        return x + self.mlp(rms(x))


class PlainEncoder(nn.Module):
    """Images B 3 H W -> maps B out H/patch W/patch: patch convolution, positions, blocks, norm, linear."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, out: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patch_embed(x)
        grid = maps.shape[-2:]
        x = maps.flatten(2).transpose(1, 2) + positions(self.pos_embed, grid)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(rms(x)).transpose(1, 2).unflatten(2, grid)
