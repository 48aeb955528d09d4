"""RAR's own network (arXiv 2411.00776): codes in any order, blocks modulated by the class.

    [class | code o(0) .. code o(T-2)]  ->  logits of [code o(0) .. code o(T-1)]

To every input two learned vectors are added: of its own place, and of the place that is to be predicted, so
that one network knows every order o. Blocks are those of a ViT with a GELU feed-forward; queries and keys are
normalised; the class's embedding shifts, scales and gates each branch (adaLN-zero), and shifts and scales the
output. Contract, cache and drawing are those of :class:`vfmlab.ar.llamagen.LlamaGen`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.ar.llamagen import INIT, Cache, CodeShape, LlamaGen, Past
from vfmlab.config import SizedConfig
from vfmlab.nn.attention import attend
from vfmlab.registry import TOKEN_NETWORKS

SIZES = {  # name: (width, depth, heads)
    "B": (768, 24, 16),
    "L": (1024, 24, 16),
    "XL": (1280, 32, 16),
    "XXL": (1408, 40, 16),
}
HIDDEN = {"XXL": 6144}  # of the feed-forward, where it is not 4 x the width


class Shape(SizedConfig):
    """Options of :class:`RAR`."""

    SIZES = SIZES
    target_places: ClassVar[bool] = True  # it always knows the place that it predicts

    kind: str = "rar"
    size: Literal["B", "L", "XL", "XXL"] | None = Field(None, description="RAR's width, depth and heads")
    hidden: int | None = Field(None, ge=1, description="of the feed-forward; null: 4 x width, 6144 for XXL")
    dropout: float = Field(0.1, ge=0, lt=1, description="of what each block adds")

    @property
    def inner(self) -> int:
        """Width inside the feed-forward."""
        return self.hidden or HIDDEN.get(self.size or "", 4 * self.sizes[0])


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """x + gate attention(norm(x)), then x + gate mlp(norm(x)); tokens B N D, causal; c: B D, activated."""

    def __init__(self, config: Shape):
        super().__init__()
        width, _, self.heads = config.sizes
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(width // self.heads, eps=1e-6) for _ in range(2))
        self.expand, self.contract = nn.Linear(width, config.inner), nn.Linear(config.inner, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, c: Tensor, past: Past | None = None, at: int = 0) -> Tensor:
        """past: keys and values of this block, where x is token number `at`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        b, n, d = x.shape
        h = modulated(self.norm1(x), shift1, scale1)
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if past is not None:
            k, v = past.append(k, v, at)
        out = attend(q, k, v, causal=past is None).transpose(1, 2).reshape(b, n, d)
        x = x + gate1[:, None] * self.dropout(self.proj(out))
        h = self.expand(modulated(self.norm2(x), shift2, scale2))
        return x + gate2[:, None] * self.dropout(self.contract(F.gelu(h)))


@TOKEN_NETWORKS.register("rar")
class RAR(LlamaGen):
    """Logits of the codes of an image; arguments and errors as LlamaGen's."""

    Config = Shape

    def __init__(self, config: Shape, codes: CodeShape, num_classes: int):
        nn.Module.__init__(self)
        codes.check()
        self.config, self.codes, self.num_classes = config, codes, num_classes
        width, depth, _ = config.sizes
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.token_embedding = nn.Embedding(codes.entries, width)
        self.places = nn.Parameter(torch.empty(codes.tokens + 1, width))  # 0: the class token's own
        self.targets = nn.Parameter(torch.empty(codes.tokens, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, codes.entries)
        self.apply(self._initialise)
        for parameter in (self.places, self.targets):
            nn.init.normal_(parameter, std=INIT)
        for layer in (self.head, self.modulation, *(block.modulation for block in self.blocks)):
            nn.init.zeros_(layer.weight)  # adaLN-zero; the first loss is ln K
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, labels: Tensor, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits of every code given those before it: B T K; arguments as LlamaGen's."""
        places, targets = self.places[: codes.shape[1]], self.targets
        if order is not None:
            codes, targets = codes.gather(1, order), self.targets[order]
            own = torch.cat([torch.zeros_like(order[:, :1]), order[:, :-1] + 1], dim=1)
            places = self.places[own]
        first = self.class_embedding(labels)
        x = torch.cat([first[:, None], self.token_embedding(codes[:, :-1])], dim=1) + places + targets
        c = F.silu(first)
        for block in self.blocks:
            x = block(x, c)
        return self._out(x, c)

    def _out(self, x: Tensor, c: Tensor) -> Tensor:
        return self.head(modulated(self.norm(x), *self.modulation(c).chunk(2, dim=-1)))

    def _input(self, x: Tensor, at: int, cache: Cache) -> tuple[Tensor, Tensor]:
        return (x + self.places[at] + self.targets[at])[:, None], F.silu(cache.condition[: len(x)])
