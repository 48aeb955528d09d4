"""Continuity: what is decoded changes little when tokens turn on their sphere (PAE, 2605.07915: MCR)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


def turned(z: Tensor, noise: Tensor, degrees: float) -> Tensor:
    """Tokens of z (B C h w) turned by an angle towards the tangent part of `noise`; lengths stay."""
    length = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit = z / length
    aside = F.normalize(noise - (noise * unit).sum(1, keepdim=True) * unit, dim=1)
    angle = math.radians(degrees)
    return length * (math.cos(angle) * unit + math.sin(angle) * aside)


@LOSSES.register("cascade")
class Cascade(Loss):
    """Mean absolute difference of neighbours among images decoded from ever more perturbed latents.

    `r.perturbed` holds them, from the angles here; the less perturbed of two neighbours gets no gradient. The
    paper adds LPIPS to the difference.
    """

    class Config(config.LossConfig):
        degrees: tuple[float, ...] = Field((42.5, 85.0), min_length=1, description="angles by which tokens "
                                                                                   "are turned")

    def value(self, r: Reconstruction) -> Tensor:
        if not r.perturbed:
            raise ConfigError(f"losses.{self.name}: nothing was decoded from perturbed latents; train "
                              "through vfmlab.train")
        pairs = zip([r.images[0], *r.perturbed], r.perturbed, strict=False)
        return torch.stack([F.l1_loss(more, less.detach()) for less, more in pairs]).mean()
