"""Normalisations shared by the decoders. Statistics are taken in fp32 whatever the activations are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# torch 2.11's backward ends the process on a CPU where the input of a group norm is stored with channels
# last and wants no gradient, as in a stage that trains the last blocks of a decoder; 2.15's does not.
OLD = torch.__version__ < (2, 15)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in fp32, given back in the input's precision (torch's bf16 kernel is slower on the CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if OLD and x.device.type == "cpu" and not x.requires_grad:
                x = x.contiguous()
            return super().forward(x.float()).to(x.dtype)


def group_norm(channels: int, least: int = 4) -> GroupNorm:
    """GroupNorm with as many groups as divide `channels`, up to 32, each of at least `least` channels."""
    groups = max(1, min(32, channels // least))
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(channels) * gain over one dimension, in fp32. dim 1: maps B C H W; dim -1: tokens."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.dim = dim
        self.gain = nn.Parameter(torch.ones(channels, 1, 1) if dim == 1 else torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x.float(), dim=self.dim)
        return (unit * (self.gain * x.shape[self.dim] ** 0.5)).to(x.dtype)


@torch.no_grad()
def settle(net: nn.Module, images: Tensor) -> None:
    """Batch norms of a network that nobody trained take the statistics of `images` (B 3 H W).

    With the initial ones (mean 0, variance 1) the signal would shrink in every convolution: a random network
    that serves as a control must be a fair one.
    """
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()
        norm.momentum = 1.0
    net(images)


def smooth_noise(count: int, side: int) -> Tensor:
    """Images of smooth noise in [-1, 1] (count 3 side side), from torch's global generator."""
    noise = torch.randn(count, 3, 8, 8)
    return F.interpolate(noise, (side, side), mode="bicubic", align_corners=False).clamp(-1, 1)
