"""RAEv2's network (arXiv 2605.18324): conditions as tokens, a wide head, the clean latent predicted, a second
read-out.

    patch tokens, time tokens, class tokens -> blocks without modulation -> patch tokens
    head: SiLU(time + patch tokens) -> modulation, per token, of wide blocks on noisy latents -> clean latent
    base: the same sum after block `base_depth` -> last layer that it conditions itself -> clean latent

Each condition token is a vector of its own plus the embedding of time or class; it has no place. Both
read-outs are trained, and the difference between them guides sampling at the cost of one evaluation
(`vfmlab.diffusion.guidance`, kind "internal"). The velocity of a clean estimate z' is (x - z') / max(t,
0.05). The paper's control reads velocities out in place of clean latents: `least_time` null.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.diffusion import blocks
from vfmlab.diffusion.blocks import Block, FinalLayer, FourierEmbedding, RMSNorm, unpatchify
from vfmlab.diffusion.ddt import HeadShape, Split
from vfmlab.diffusion.dit import pick, token_grid
from vfmlab.diffusion.path import clean
from vfmlab.nn.attention import SelfAttention
from vfmlab.nn.rope import rotary_table
from vfmlab.registry import NETWORKS


class Readouts(NamedTuple):
    """Two velocities (or two clean latents) of one evaluation, B C h w each: the head's and the base's."""

    v: Tensor
    base: Tensor


class PlainBlock(nn.Module):
    """x + attention(norm x), then x + SwiGLU(norm x): RMS norms with weights, q and k normalised per head."""

    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn = SelfAttention(width, heads, qk_norm=RMSNorm)
        self.mlp = blocks.feed_forward(width, ratio, swiglu=True)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


@NETWORKS.register("raev2")
class RAEv2(Split):
    """Network with tokens of condition, head and base; arguments and contract as
    :class:`vfmlab.diffusion.dit.LightningDiT`: called, it gives the head's velocity.

    Attributes:
        least_time: below this time velocities are (x - z) / least_time, and training's targets follow; None:
            velocities are what is read out.
        base_weight: of the base read-out's loss; 0 where there is none.
    """

    class Config(HeadShape):
        kind: str = "raev2"
        time_tokens: int = Field(4, ge=1, description="tokens that carry the time")
        class_tokens: int = Field(8, ge=1, description="tokens that carry the class")
        base_depth: int | None = Field(8, ge=1, description="block after which the second read-out stands; "
                                                            "null: none, and no internal guidance")
        base_weight: float = Field(1.0, gt=0, description="of its loss")
        least_time: float | None = Field(0.05, gt=0, lt=1, description="divisor of velocities at earlier "
            "times; null: velocities are read out, not clean latents")

        @model_validator(mode="after")
        def _fits(self) -> RAEv2.Config:
            depth = self.sizes[1]
            if self.base_depth is not None and self.base_depth > depth:
                raise ValueError(f"base_depth {self.base_depth}: the stack has blocks 1 to {depth}; choose "
                                 "one of them, or null")
            return self

    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        width, depth, heads = config.sizes
        channels, wide, ratio = latent_shape[0], config.head_width, config.mlp_ratio
        self.config, self.latent_shape, self.num_classes = config, tuple(latent_shape), num_classes
        self.grid = token_grid(latent_shape, config.patch)
        self.least_time = config.least_time
        self.base_weight = 0.0 if config.base_depth is None else config.base_weight
        out = config.patch**2 * channels

        self.patch_embed = nn.Conv2d(channels, width, config.patch, config.patch)
        self.time_embed, self.label_embed = FourierEmbedding(width), nn.Embedding(num_classes + 1, width)
        self.time_tokens = nn.Parameter(0.02 * torch.randn(config.time_tokens, width))
        self.class_tokens = nn.Parameter(0.02 * torch.randn(config.class_tokens, width))
        self.blocks = nn.ModuleList(PlainBlock(width, heads, ratio) for _ in range(depth))
        self.base = None if config.base_depth is None else FinalLayer(width, out, "rms")
        self.to_head = nn.Linear(width, wide)
        self.head_patch_embed = nn.Conv2d(channels, wide, config.patch, config.patch)
        self.head_blocks = nn.ModuleList(Block(wide, config.head_heads, ratio, "rms", True, True, False)
                                         for _ in range(config.head_depth))
        self.final = FinalLayer(wide, out, "rms")
        table = rotary_table(self.grid, width // heads)
        still = torch.zeros(2, config.time_tokens + config.class_tokens, table.shape[-1])
        still[1] = 1  # sine 0, cosine 1: no turn
        self.register_buffer("rope", torch.cat([table, still], dim=1), persistent=False)
        table = rotary_table(self.grid, wide // config.head_heads)
        self.register_buffer("head_rope", table, persistent=False)
        blocks.initialise(self)

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """Patch tokens after embedding and each block of the stack, B N D; arguments as :meth:`forward`."""
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        time = self.time_tokens + self.time_embed(t).unsqueeze(1)
        label = self.class_tokens + self.label_embed(y).unsqueeze(1)
        patches, h = h.shape[1], torch.cat([h, time, label], dim=1)
        states = [h[:, :patches]]
        for block in self.blocks:
            h = block(h, self.rope)
            states.append(h[:, :patches])
        return states

    def _velocity(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Of what was read out, B C h w."""
        if self.least_time is None:
            return out
        return (x - out) / t.clamp_min(self.least_time).view(-1, 1, 1, 1).to(x)

    def _base(self, t: Tensor, tokens: Tensor) -> Tensor:
        h = F.silu(self.time_embed(t).unsqueeze(1) + tokens)
        return unpatchify(self.base(h, F.silu(h)), self.config.patch, self.grid)

    def head(self, x: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Velocity B C h w under the stack's last patch tokens (B N D), and the head's tokens by block."""
        out, states = super().head(x, t, tokens)
        return self._velocity(x, t, out), states

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Readouts:
        """The clean latents of both read-outs, in place of velocities; arguments as :meth:`forward`."""
        if self.least_time is None:
            return Readouts(*(clean(x, v, t) for v in self(x, t, y, readouts=True)))
        states = self.encode(x, t, y)
        return Readouts(super().head(x, t, states[-1])[0], self._base(t, states[self.config.base_depth]))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, features_at: tuple[int, ...] = (),
                readouts: bool = False) -> Tensor | Readouts | tuple[Tensor | Readouts, dict[int, Tensor]]:
        """Velocity at noisy latents x (B C h w), times t (B), labels y (B); blocks of the head follow the
        stack's. readouts: the velocities of both read-outs (:class:`Readouts`)."""
        states = self.encode(x, t, y)
        v, more = self.head(x, t, states[-1])
        if readouts:
            v = Readouts(v, self._velocity(x, t, self._base(t, states[self.config.base_depth])))
        return v if not features_at else (v, pick(dict(enumerate(states + more)), features_at))
