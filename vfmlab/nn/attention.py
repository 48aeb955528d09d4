"""Scaled dot-product attention, with the formulation that is fast in training on each device; its layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.rope import rotate


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.  q: B heads N d, k and v: B heads M d, mask: broadcastable to B heads N M,
    True = attend. causal: token i attends to tokens 0 to i; in place of a mask.

    On the CPU in bf16 the backward pass of torch's fused kernel is more than ten times slower than two matrix
    products at the token counts of small models (tens to hundreds of tokens), so there the products are
    written out; the softmax runs in fp32 as in the fused kernel. Everywhere else torch chooses (flash,
    memory-efficient, math).
    """
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16
                                   or torch.is_autocast_enabled("cpu")) and k.shape[-2] <= 1024:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SelfAttention(nn.Module):
    """Multi-head self-attention of B N D. qk_norm: from a head's width, the norm of its queries and keys."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, bias: bool = True,
                 qk_norm: Callable[[int], Callable[[Tensor], Tensor]] = nn.Identity):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, qkv_bias), nn.Linear(width, width, bias)
        self.q_norm, self.k_norm = (qk_norm(width // heads) for _ in range(2))

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """rope: rotary table of the tokens (`vfmlab.nn.rope`)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads N d
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
