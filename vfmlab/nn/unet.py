"""A U-Net that knows the time, as diffusion models of pixels use (ADM, arXiv 2105.05233): residual blocks
whose second norm is scaled and shifted by the time, halved and doubled in between, with skips."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.conv_blocks import group_norm


class TimedBlock(nn.Module):
    """B C H W and the time's embedding B E -> B C' H W; the last convolution begins at zero."""

    def __init__(self, width: int, out: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.time = nn.Linear(embedding, 2 * out)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class TimeEmbedding(nn.Sequential):
    """Times B in [0, 1] -> B 4 width: sines and cosines of 1000 t, then two layers; SiLU at the end."""

    def __init__(self, width: int):
        super().__init__(nn.Linear(2 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        place = torch.arange(self.width, device=t.device, dtype=torch.float32) / self.width
        angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10_000.0) * place)
        return F.silu(super().forward(torch.cat([angle.cos(), angle.sin()], dim=1).to(self[0].weight)))


class UNet(nn.Module):
    """Images B inputs H W at times t (B, in [0, 1]) -> B out H W; sides must divide by 2^(levels - 1).

    Args:
        base: width of the finest level. multipliers: widths of the levels over it, finest first. blocks: of
        each level on the way down; one more on the way up.
    """

    def __init__(self, inputs: int, out: int, base: int, multipliers: tuple[int, ...], blocks: int):
        super().__init__()
        embedding, widths = 4 * base, [base * m for m in multipliers]
        self.embed = TimeEmbedding(base)
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down, self.up, skips, width = nn.ModuleList(), nn.ModuleList(), [widths[0]], widths[0]
        for level, target in enumerate(widths):
            for _ in range(blocks):
                self.down.append(TimedBlock(width, target, embedding))
                width = target
                skips.append(width)
            if level + 1 < len(widths):
                self.down.append(nn.Conv2d(width, width, 3, 2, 1))
                skips.append(width)
        self.middle = TimedBlock(width, width, embedding)
        for level, target in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(TimedBlock(width + skips.pop(), target, embedding))
                width = target
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.embed(t)
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, time) if isinstance(layer, TimedBlock) else layer(h)
            skips.append(h)
        h = self.middle(h, time)
        for layer in self.up:
            if isinstance(layer, TimedBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), time)
            else:
                h = layer(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))
