"""Latents at fewer bits: principal channels, cut off and rounded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vfmlab.seeding import generator

# Half widths of the rounded interval, in deviations.
RANGES = (0.8, 1.2, 1.6, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
TOKENS = 4096  # on which the interval is chosen


class Coder:
    """Principal channels of latents N C h w, cut off after the first k and rounded to 2^bits even levels.

    Values beyond an interval are clipped; its width, by channel, has the least squared error on `maps`.
    """

    def __init__(self, maps: Tensor):
        x = maps.permute(0, 2, 3, 1).flatten(0, 2).double()
        self.mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean) / len(x))
        self.basis, self.std = vectors.flip(1), values.flip(0).clamp_min(0).sqrt().clamp_min(1e-12)
        draw = torch.randperm(len(x), generator=generator("coder"))[:TOKENS]
        self.sample = (x[draw] - self.mean) @ self.basis / self.std
        self.read, self.write = (self.basis / self.std).float(), (self.basis * self.std).T.float()
        self.half: dict[int, Tensor] = {}

    def interval(self, bits: int) -> Tensor:
        """Half width of the rounded interval of each principal channel, in deviations: C."""
        if bits not in self.half:
            rounded = (_round(self.sample, torch.tensor(half), bits)[0] for half in RANGES)
            errors = torch.stack([(x - self.sample).square().mean(0) for x in rounded])
            self.half[bits] = torch.tensor(RANGES, dtype=torch.float64)[errors.argmin(0)]
        return self.half[bits]

    def __call__(self, maps: Tensor, channels: int, bits: int) -> tuple[Tensor, float]:
        """Rounded latents, and the bits per token that an ideal coder of each single channel needs."""
        n, _, h, w = maps.shape
        x = (maps.permute(0, 2, 3, 1).flatten(0, 2) - self.mean.float()) @ self.read[:, :channels]
        rounded, symbol = _round(x, self.interval(bits)[:channels].float(), bits)
        entropy = 0.0
        for column in symbol.long().unbind(1):
            entropy += float(torch.special.entr(column.bincount().double() / len(column)).sum()) / math.log(2)
        back = rounded @ self.write[:channels] + self.mean.float()
        return back.view(n, h, w, -1).permute(0, 3, 1, 2), entropy


def _round(x: Tensor, half: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x rounded to the middles of 2^bits even parts of [-half, half], and which part."""
    levels = 2**bits
    symbol = ((x / (2 * half) + 0.5) * levels).floor().clamp(0, levels - 1)
    return ((symbol + 0.5) / levels - 0.5) * 2 * half, symbol
