"""Multi-scale deformable attention in plain PyTorch (Deformable DETR, arXiv 2010.04159, section 4.1).

A query looks at a few points of each feature map. Where they lie, and what each of them weighs, are linear in
the query, so the cost does not grow with the size of the maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DeformableAttention(nn.Module):
    """Queries on feature maps of any number of sizes.

    A place is reference + offset / (width, height of the map): offsets count its pixels. Values are sampled
    bilinearly, pixel centres at half integers, zeros outside. Weights are a softmax over levels and points
    together. At first they are all alike, and the points of each head go out in a direction of its own.

    Args:
        width: of queries and maps. heads: must divide it. levels: number of maps. points: in each, for every
        head.
    """

    def __init__(self, width: int, heads: int = 8, levels: int = 4, points: int = 4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = 2 * math.pi * torch.arange(heads, dtype=torch.float32) / heads
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, points + 1, dtype=torch.float32)
        start = direction[:, None, None] * steps[:, None]  # heads 1 points 2
        self.offsets.bias.data.copy_(start.expand(-1, levels, -1, -1).flatten())

    def places(self, query: Tensor, reference: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Where is looked: B Q heads levels points 2, x first, 0 to 1 inside of a map."""
        offsets = self.offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        sizes = torch.tensor([[m.shape[-1], m.shape[-2]] for m in maps], device=query.device)  # levels (w, h)
        return reference[..., None, :, None, :] + offsets / sizes[:, None].to(offsets.dtype)

    def shares(self, query: Tensor) -> Tensor:
        """What each place weighs: B Q heads levels points, summing to 1 over the last two."""
        logits = self.weights(query).unflatten(-1, (self.heads, self.levels * self.points))
        return logits.softmax(dim=-1).unflatten(-1, (self.levels, self.points))

    def forward(self, query: Tensor, reference: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """query: B Q C. reference: [B] Q levels 2, x first, in [0, 1]. maps: `levels` of B C h w. Returns B Q
        C."""
        places, shares = self.places(query, reference, maps), self.shares(query)
        total = 0
        for level, values in enumerate(maps):
            h, w = values.shape[-2:]
            values = self.value(values.flatten(2).transpose(1, 2)).transpose(1, 2)  # B C hw
            values = values.unflatten(1, (self.heads, -1)).flatten(0, 1).unflatten(2, (h, w))
            grid = 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # B heads, Q points 2
            seen = F.grid_sample(values, grid.to(values.dtype), mode="bilinear", padding_mode="zeros",
                                 align_corners=False)  # (B heads) C/heads Q points
            share = shares[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
            total = total + (seen * share).sum(-1)
        return self.out(total.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2))
