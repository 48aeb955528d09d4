"""Parts that all transformer diffusion networks here share: embeddings, adaLN blocks, final layer,
initialisation.

Precision: statistics of norms, modulation and the residual stream are fp32 under autocast; only matrix
products and the activations between two of them run in bf16. All shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import SelfAttention


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32, returned in x's dtype (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, in fp32, returned in x's dtype; without weights if not `affine`."""

    def __init__(self, width: int, eps: float = 1e-6, affine: bool = False):
        super().__init__(width, eps, affine)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def frequencies(count: int = 128, longest: float = 10_000.0) -> Tensor:
    """Angular frequencies [count] of the sinusoidal time embedding, from 1 towards 1 / longest, in fp32."""
    return torch.exp(-math.log(longest) * torch.arange(count, dtype=torch.float32) / count)


class TimeEmbedding(nn.Module):
    """t -> D: cosines and sines of t at 128 frequencies, then a two-layer MLP (DiT, arXiv 2212.09748)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * frequencies().to(t.device)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class FourierEmbedding(nn.Module):
    """t -> D: sines and cosines of 2 pi w t at fixed random frequencies w ~ N(0, 1), then an MLP (RAE)."""

    def __init__(self, width: int, count: int = 256):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(count), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * count, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = 2 * math.pi * t.float()[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.mlp[0].weight.dtype))


# Of queries and keys; layer norm with weights and torch's default eps, as in the releases.
QK_NORMS = {"rms": RMSNorm, "layer": lambda width: LayerNorm(width, 1e-5, affine=True)}


def feed_forward(width: int, ratio: float, swiglu: bool) -> nn.Module:
    """SwiGLU with 2/3 of the hidden width, so that it has the parameters of the plain MLP, or an MLP with
    tanh-GELU.

    tanh-GELU is several times slower than SiLU on the CPU in bf16; small networks there should use SwiGLU.
    """
    # imports seconds of code that reading a config must not wait for
    from timm.layers import Mlp, SwiGLUPacked

    hidden = int(width * ratio)
    if swiglu:
        return SwiGLUPacked(width, 2 * int(2 / 3 * hidden))
    return Mlp(width, hidden, act_layer=lambda: nn.GELU(approximate="tanh"))


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x * (1 + scale) + shift; x: B N D, scale and shift: B D (per image) or B N D (per token)."""
    scale, shift = (m.unsqueeze(1) if m is not None and m.ndim == 2 else m for m in (scale, shift))
    return x * (1 + scale) if shift is None else torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Transformer block with adaLN-zero conditioning (DiT section 3.2).

    Args:
        norm: "rms" (with weight) or "layer" (without). qk_norm: the same norm on queries and keys.
        shift_free: modulation without shifts (LightningDiT's "w/o shift").
    """

    def __init__(self, width: int, heads: int, ratio: float, norm: str, qk_norm: bool, swiglu: bool,
                 shift_free: bool):
        super().__init__()
        self.norm1, self.norm2 = (RMSNorm(width) if norm == "rms" else LayerNorm(width) for _ in range(2))
        self.attn = SelfAttention(width, heads, qk_norm=QK_NORMS[norm] if qk_norm else nn.Identity)
        self.mlp = feed_forward(width, ratio, swiglu)
        self.modulation, self.shift_free = nn.Linear(width, (4 if shift_free else 6) * width), shift_free

    def forward(self, x: Tensor, c: Tensor, rope: Tensor | None = None) -> Tensor:
        """x: B N D tokens; c: B D or B N D activated condition (after its SiLU) -> B N D."""
        parts = self.modulation(c).to(x.dtype).chunk(4 if self.shift_free else 6, dim=-1)
        if self.shift_free:
            scale1, gate1, scale2, gate2 = parts
            shift1 = shift2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = parts
        gate1, gate2 = (g.unsqueeze(1) if g.ndim == 2 else g for g in (gate1, gate2))
        x = x + gate1 * self.attn(modulate(self.norm1(x), scale1, shift1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), scale2, shift2))


class FinalLayer(nn.Module):
    """Modulated norm and projection of tokens to patches: B N D -> B N (patch * patch * channels)."""

    def __init__(self, width: int, out: int, norm: str):
        super().__init__()
        self.norm = RMSNorm(width) if norm == "rms" else LayerNorm(width)
        self.modulation, self.linear = nn.Linear(width, 2 * width), nn.Linear(width, out)

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:
        """What the projection reads: B N D."""
        shift, scale = self.modulation(c).to(x.dtype).chunk(2, dim=-1)
        return modulate(self.norm(x), scale, shift)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(self.modulated(x, c))


def unpatchify(x: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """B N (p p C), tokens row by row -> B C h w."""
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(1, grid)  # B h w p p C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def initialise(network: nn.Module) -> None:
    """DiT's initialisation, in place: Xavier for linear and patch layers, normal(0.02) for embeddings.

    Every `modulation` and the output are zero, so that each block starts as the identity and the velocity as
    zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, TimeEmbedding | FourierEmbedding):
            module.apply(lambda m: nn.init.normal_(m.weight, std=0.02) if isinstance(m, nn.Linear) else None)
    for name, module in network.named_modules():
        if name.endswith("modulation") or isinstance(module, FinalLayer):
            for part in (module, getattr(module, "linear", None)):
                if isinstance(part, nn.Linear):
                    nn.init.zeros_(part.weight)
                    nn.init.zeros_(part.bias)
