"""Pre-norm transformer block on tokens: attention and feed-forward, each behind a norm, with a residual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import attend
from vfmlab.nn.rope import rotate

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # the exact one: torch's tanh form is several times slower on CPUs
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "leaky_relu": partial(F.leaky_relu, negative_slope=0.2),
}


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens B N C.

    Args:
        width: of the tokens. heads: must divide it. hidden: of the feed-forward. eps, norm: of both norms.
        gated: SwiGLU, contract(silu(gate(x)) * value(x)), in place of contract(activation(expand(x))).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, activation: Activation = "gelu", eps: float = 1e-6,
        qkv_bias: bool = True, norm: Literal["layer", "rms"] = "layer", gated: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.gated, self.activation = heads, gated, ACTIVATIONS["silu" if gated else activation]
        make_norm = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.norm1, self.norm2 = make_norm(width, eps=eps), make_norm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=qkv_bias), nn.Linear(width, width)
        self.expand = nn.Linear(width, 2 * hidden if gated else hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """rope: table of the tokens' grid (`vfmlab.nn.rope`), or None. mask: N N, True = attend, or None."""
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        x = x + self.proj(attend(q, k, v, mask).transpose(1, 2).reshape(b, n, c))
        h = self.expand(self.norm2(x))
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            return x + self.contract(self.activation(gate) * value)
        return x + self.contract(self.activation(h))
