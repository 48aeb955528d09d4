"""PAE's parts (arXiv 2605.07915): a delta encoder that looks at pixels and at a VFM's tokens, and attention
with a convolution that squeezes its tokens into a latent and widens them again. Tokens B N D, maps B C h
w."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import SelfAttention, attend
from vfmlab.nn.rope import positions, sincos_table

EPS = 1e-5
Fusion = Literal["sft", "add", "concat", "none"]


class CrossAttention(nn.Module):
    """Queries of x (B N D), keys and values of u (B M D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        q, k, v = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.q_proj, x), (self.k_proj, u), (self.v_proj, u))
        )
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class DeltaBlock(nn.Module):
    """x + self-attention, then + cross-attention to the VFM's tokens, then + MLP, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2_q, self.norm2_kv, self.norm3 = (nn.LayerNorm(width, eps=EPS) for _ in range(4))
        self.self_attn, self.cross_attn = SelfAttention(width, heads), CrossAttention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2_q(x), self.norm2_kv(u))
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))


class DeltaEncoder(nn.Module):
    """Pixels and VFM tokens u -> tokens B N D that add to u what it lost.

    Patch convolution, fixed sine-cosine positions, blocks; then "sft": norm(u (1 + g) + b) with g and b
    linear in x, zero at the start; "add": norm(u + linear x); "concat": norm of a linear map of both; "none":
    norm(u).
    """

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, fusion: Fusion = "sft"):
        super().__init__()
        self.fusion = fusion
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.register_buffer("pos_embed", sincos_table((side, side), width)[None])
        self.layers = nn.ModuleList(DeltaBlock(width, heads) for _ in range(depth))
        inputs, outputs = {"sft": (1, 2), "add": (1, 1), "concat": (2, 1), "none": (1, 1)}[fusion]
        self.fusion_proj = None if fusion == "none" else nn.Linear(inputs * width, outputs * width)
        self.final_ln = nn.LayerNorm(width, eps=EPS)
        if fusion in ("sft", "add"):
            nn.init.zeros_(self.fusion_proj.weight)
            nn.init.zeros_(self.fusion_proj.bias)

    def forward(self, pixels: Tensor, u: Tensor) -> Tensor:
        """pixels: B 3 H W as the VFM sees them. u: B N D."""
        if self.fusion == "none":
            return self.final_ln(u)
        maps = self.patch_embed(pixels)
        x = maps.flatten(2).transpose(1, 2) + positions(self.pos_embed, maps.shape[-2:])
        for layer in self.layers:
            x = layer(x, u)
        if self.fusion == "sft":
            scale, shift = self.fusion_proj(x).chunk(2, dim=-1)
            return self.final_ln(u * (1 + scale) + shift)
        if self.fusion == "add":
            return self.final_ln(u + self.fusion_proj(x))
        return self.final_ln(self.fusion_proj(torch.cat([u, x], dim=-1)))


class Compressor(nn.Module):
    """Tokens B N D -> maps B C h w: self-attention without residual or norm, then a 3x3 convolution."""

    def __init__(self, width: int, channels: int, heads: int):
        super().__init__()
        self.attn, self.conv = SelfAttention(width, heads, False), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.conv(self.attn(x).transpose(1, 2).unflatten(2, grid))


class Decompressor(nn.Module):
    """Maps B C h w -> maps B D h w: a 3x3 convolution, then self-attention."""

    def __init__(self, channels: int, width: int, heads: int):
        super().__init__()
        self.conv, self.attn = nn.Conv2d(channels, width, 3, padding=1), SelfAttention(width, heads, False)

    def forward(self, z: Tensor) -> Tensor:
        maps = self.conv(z)
        return self.attn(maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, maps.shape[-2:])
