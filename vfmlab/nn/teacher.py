"""A teacher that squeezes a frozen VFM's map into the channels of a latent (GAE, arXiv 2603.10365, first
stage).

    map -> RMS norm (the target) -> + positions -> one attention layer, no residual -> RMS norm -> linear over
    windows -> RMS norm: the code -> linear, + positions, blocks, RMS norm: the rebuilt target

It is trained to rebuild the map alone; then its codes are what a tokenizer's latents should be near to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from vfmlab.errors import ConfigError
from vfmlab.nn.plain_vit import PlainBlock, attention, rms
from vfmlab.nn.rope import positions


@dataclass(frozen=True)
class Taught:
    """What a teacher says of one batch. code: B C h w. target, rebuilt: the VFM's map as it is learned, and
    as it is rebuilt from the code, B D h w."""

    code: Tensor
    target: Tensor
    rebuilt: Tensor


class Teacher(nn.Module):
    """VFM maps B D h w -> :class:`Taught`.

    Args:
        width: D. channels: of the code. side: of the map. window: the linear map to the code sees window x
        window tokens at once. depth: blocks of the way back.
    """

    def __init__(self, width: int, channels: int, side: int, window: int = 1, depth: int = 1,
                 heads: int = 16):
        super().__init__()
        if side % window:
            raise ConfigError(f"tokenizer.teacher.window {window} does not divide the map of {side} x "
                              f"{side}; 1 always does")
        if width % heads:
            raise ConfigError(f"tokenizer.teacher.heads {heads}: the VFM's width {width} is no multiple of "
                              "it")
        self.window, area = window, window**2
        self.pos_embed_pro = nn.Parameter(0.02 * torch.randn(1, side**2, width))
        self.pos_embed_dec = nn.Parameter(0.02 * torch.randn(1, side**2, width))
        self.projector = attention(width, heads)
        self.to_latent = nn.Linear(area * width, area * channels, bias=False)
        self.recon_head = nn.Linear(channels, width, bias=False)
        self.decoder_layers = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))

    def encode(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised map B D h w -> tokens before the linear map B N D, code B N C."""
        grid = target.shape[-2:]
        x = target.flatten(2).transpose(1, 2) + positions(self.pos_embed_pro, grid)
        neck = rms(self.projector(rms(x)))
        w = self.window
        places = {"h": grid[0] // w, "w": grid[1] // w, "p": w, "q": w}
        windows = rearrange(neck, "b (h p w q) d -> b (h w) (p q d)", **places)
        code = rearrange(self.to_latent(windows), "b (h w) (p q d) -> b (h p w q) d", **places)
        return neck, rms(code)

    def forward(self, maps: Tensor) -> Taught:
        target = rms(maps.movedim(1, -1)).movedim(-1, 1)
        grid = maps.shape[-2:]
        _, code = self.encode(target)
        x = self.recon_head(code) + positions(self.pos_embed_dec, grid)
        for block in self.decoder_layers:
            x = block(x)
        code, rebuilt = (part.transpose(1, 2).unflatten(2, grid) for part in (code, rms(x)))
        return Taught(code, target, rebuilt)
