"""SVG's residual branch (arXiv 2510.15301): a small ViT that gives a few channels beside a VFM's tokens,
brought to the same mean and spread."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmlab.nn.rope import positions
from vfmlab.nn.vit_block import ViTBlock

EPS = 1e-6


class ResidualBranch(nn.Module):
    """Images B 3 H W -> maps B out H/patch W/patch: patches, class token, learned positions, blocks, norm,
    then a two-layer perceptron at every patch."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, hidden: int, out: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(ViTBlock(width, heads, hidden, eps=EPS) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patch_embed(images)
        x = torch.cat([self.class_token.expand(len(maps), -1, -1), maps.flatten(2).transpose(1, 2)], dim=1)
        x = x + positions(self.position, maps.shape[-2:], prefix=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 1:]).transpose(1, 2).unflatten(2, maps.shape[-2:])


class Spread(NamedTuple):
    """One mean and one standard deviation of a map, both scalar tensors."""

    mean: Tensor
    std: Tensor


def spread(maps: Tensor) -> Spread:
    """Of B C h w: the mean of all values; the unbiased std over images and places, averaged over channels."""
    return Spread(maps.mean(), maps.transpose(0, 1).flatten(1).std(1).mean())


def matched(branch: Tensor, own: Spread, target: Spread) -> Tensor:
    """`branch` (B C h w) moved and scaled from mean and std `own` to those of `target`."""
    return (branch - own.mean) / (own.std + EPS) * target.std + target.mean
