"""Bounded fusion of a VFM's layers (HiRAE): the last layer, plus small signed residuals of all of them.

    E_l(h) = norm(W2 GELU(norm(W1 norm(h))))          one expert a layer
    a = Linear(h_last), of unit length over the layers          one router
    d_g = sum of a_l E_l(h_l) over the layers of group g, shortened to cap_g |h_last| where it is longer
    out = h_last + sum over the groups of d_g

Groups are thirds of the layers, shallow to deep. In training a group's whole residual is dropped for an image
with its chance. Without caps and dropout reconstruction is near perfect and generation is lost.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import Section


class FusionConfig(Section):
    """The paper's values. dropout, caps: of the shallow, the middle and the deep third of the layers."""

    ratio: float = Field(4.0, gt=0, description="hidden width of an expert over the VFM's")
    dropout: tuple[float, float, float] = Field((0.5, 0.25, 0.1), description="chance that an image loses a "
                                                                             "group's residual in training")
    caps: tuple[float, float, float] | None = Field((0.025, 0.075, 0.15), description="longest residual of a "
        "group over the last layer's length, per image; null: unbounded")

    @model_validator(mode="after")
    def _ranges(self) -> FusionConfig:
        if not all(0 <= p < 1 for p in self.dropout):
            raise ValueError(f"dropout {list(self.dropout)}: chances are at least 0 and below 1")
        if self.caps is not None and not all(cap > 0 for cap in self.caps):
            raise ValueError(f"caps {list(self.caps)}: must be above 0, or caps=null for none")
        return self


class Expert(nn.Module):
    """norm(W2 GELU(norm(W1 norm(h)))): B N D -> B N D."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.first, self.inner, self.last = nn.LayerNorm(width), nn.LayerNorm(hidden), nn.LayerNorm(width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.last(self.contract(F.gelu(self.inner(self.expand(self.first(h))))))


class BoundedFusion(nn.Module):
    """Maps of `layers` layers, B D h w each, shallow to deep -> one map B D h w.

    Args:
        width: of every layer. layers: at least 3, so that each third has one.
    """

    def __init__(self, width: int, layers: int, config: FusionConfig):
        super().__init__()
        self.config = config
        self.experts = nn.ModuleList(Expert(width, round(config.ratio * width)) for _ in range(layers))
        self.router = nn.Linear(width, layers)
        ends = [0, -(-layers // 3), -(-2 * layers // 3), layers]  # as equal as can be
        self.groups = [list(range(a, b)) for a, b in pairwise(ends)]

    def forward(self, maps: list[Tensor]) -> Tensor:
        tokens = [m.float().flatten(2).transpose(1, 2) for m in maps]
        last = tokens[-1]
        share = F.normalize(self.router(last), dim=-1)  # B N L
        out = last
        for number, group in enumerate(self.groups):
            residual = sum(share[..., k : k + 1] * self.experts[k](tokens[k]) for k in group)
            out = out + self.drop(number, self.bounded(number, residual, last))
        return out.transpose(1, 2).unflatten(2, maps[-1].shape[-2:])

    def bounded(self, group: int, residual: Tensor, last: Tensor) -> Tensor:
        """Shortened, image by image, where its Frobenius norm is above the cap."""
        if self.config.caps is None:
            return residual
        most = self.config.caps[group] * last.flatten(1).norm(dim=1)
        length = residual.flatten(1).norm(dim=1).clamp_min(1e-12)
        return residual * (most / length).clamp(max=1).view(-1, 1, 1)

    def drop(self, group: int, residual: Tensor) -> Tensor:
        """Without the images that lose it, in training; the others' is not scaled up (ours), or it would pass
        its cap."""
        if not self.training:
            return residual
        stays = torch.rand(len(residual), 1, 1, device=residual.device) >= self.config.dropout[group]
        return residual * stays
