"""Attention over the pixels of a map, to itself or to a context, with one learned null key and value
(GigaGAN).

arXiv 2303.05511, section 3.2, with dot products. The null slot lets a query attend to nothing in particular.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import attend
from vfmlab.nn.norms import RMSNorm
from vfmlab.nn.pointwise import PointwiseConv


class NullAttention(nn.Module):
    """Residual branch B C H W -> same, zero at initialisation.

    Args:
        channels: of the map. heads: of width channels // heads (at least 1). context: width of the context
            tokens that keys and values come from; 0: self-attention.
    """

    def __init__(self, channels: int, heads: int = 8, context: int = 0):
        super().__init__()
        self.heads, width = heads, max(1, channels // heads)
        inner = heads * width
        self.norm = RMSNorm(channels, dim=1)
        self.q = PointwiseConv(channels, inner, bias=False)
        if context:
            self.norm_context = RMSNorm(context, dim=-1)
            self.kv = nn.Linear(context, 2 * inner, bias=False)
        else:
            self.norm_context = None
            self.k = PointwiseConv(channels, inner, bias=False)
            self.v = PointwiseConv(channels, inner, bias=False)
        self.null = nn.Parameter(torch.randn(2, heads, width))  # key, value
        self.out = PointwiseConv(inner, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: B C H W; context: B M D and mask: bool B M (True = attend), for cross-attention only.

        Under a mask the null slot is masked out as well, so each row needs at least one True (as in released
        weights).
        """
        height, width = x.shape[-2:]
        h = self.norm(x)
        q = self._split(self.q(h).flatten(2).transpose(1, 2))
        if self.norm_context is None:
            k, v = (self._split(layer(h).flatten(2).transpose(1, 2)) for layer in (self.k, self.v))
        else:
            k, v = (self._split(part) for part in self.kv(self.norm_context(context)).chunk(2, dim=-1))
        null = self.null.to(k.dtype)[:, None, :, None].expand(-1, x.shape[0], -1, -1, -1)
        k, v = torch.cat([null[0], k], dim=2), torch.cat([null[1], v], dim=2)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=False)[:, None, None]
        y = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # B HW inner
        return self.out(y.transpose(1, 2).unflatten(2, (height, width)))

    def _split(self, x: Tensor) -> Tensor:  # B N inner -> B heads N d
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class AttentionBlock(nn.Module):
    """x + attention(x), then x + feed-forward(x): RMS norm, 1x1 to 4 times the width, GELU, 1x1 (zero)."""

    def __init__(self, channels: int, heads: int = 8, context: int = 0):
        super().__init__()
        self.attention = NullAttention(channels, heads, context)
        self.norm = RMSNorm(channels, dim=1)
        self.expand = PointwiseConv(channels, 4 * channels)
        self.contract = PointwiseConv(4 * channels, channels)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(x, context, mask)
        return x + self.contract(F.gelu(self.expand(self.norm(x))))
