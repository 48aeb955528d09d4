"""Normalisations shared by the decoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def group_norm(channels: int, least: int = 4, most: int = 32) -> nn.GroupNorm:
    """GroupNorm with as many groups as divide `channels`, up to `most`, each of at least `least` channels."""
    groups = max(1, min(most, channels // least))
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(channels) * gain over one dimension, in fp32. dim 1: maps B C H W; dim -1: tokens B N C."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.dim = dim
        self.gain = nn.Parameter(torch.ones(channels, 1, 1) if dim == 1 else torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        norm = wide.norm(dim=self.dim, keepdim=True).clamp_min(1e-12)
        return (wide / norm * (self.gain * x.shape[self.dim] ** 0.5)).to(x.dtype)
