"""Alignment of the latent with a VFM (VA-VAE, arXiv 2501.01423, section 3.2; VFM-VAE, 2510.18457)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.registry import LOSSES


def on_grid(maps: Tensor, side: tuple[int, int]) -> Tensor:
    """VFM maps B D h' w' on the latent's grid: average-pooled or (anti-aliased) bilinear."""
    side = tuple(side)
    if maps.shape[-2:] == side:
        return maps
    if all(old % new == 0 for old, new in zip(maps.shape[-2:], side, strict=True)):
        return F.avg_pool2d(maps, (maps.shape[-2] // side[0], maps.shape[-1] // side[1]))
    return F.interpolate(maps, size=side, mode="bilinear", antialias=True, align_corners=False)


def alignment(z: Tensor, maps: Tensor, cos_margin: float, distance_margin: float) -> tuple[Tensor, Tensor]:
    """(marginal cosine term, distance-matrix term) of a projected latent and VFM maps, both B D h w on one
    grid.

    relu(1 - cos_margin - cos(z_i, f_i)) averaged over tokens, and relu(|cos(z_i, z_j) - cos(f_i, f_j)| -
    distance_margin) averaged over all pairs of an image; both averaged over the batch, in fp32.
    """
    z = F.normalize(z.float().flatten(2), dim=1, eps=1e-8)  # B D N
    f = F.normalize(maps.float().flatten(2), dim=1, eps=1e-8)
    cosine = F.relu(1 - cos_margin - (z * f).sum(1)).mean()
    difference = (z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs()  # B N N
    return cosine, F.relu(difference - distance_margin).mean()


@LOSSES.register("vf")
class VF(Loss):
    """cos_weight * marginal cosine + distance_weight * distance matrix, after a trained linear map C -> VFM
    width.

    Uses the sampled latent before any equivariance transform. Defaults are VFM-VAE's (margins 0, adaptive
    weight; its stages have losses.vf.weight 5, then 1); VA-VAE has cos_margin 0.5, distance_margin 0.25,
    weight 0.1.
    """

    class Config(config.LossConfig):
        cos_margin: float = Field(0.0, ge=0)
        distance_margin: float = Field(0.0, ge=0)
        cos_weight: float = Field(1.0, ge=0)
        distance_weight: float = Field(1.0, ge=0)
        adaptive: bool = Field(True, description="weight scaled by the gradient-norm ratio at the last "
                                                 "encoder layer")
        layer: int = Field(-1, description="VFM layer that is compared with")

    on_images = False

    def __init__(self, config: VF.Config, context: LossContext):
        super().__init__(config, context)
        self.layers, self.adaptive = (config.layer,), config.adaptive
        self.project = nn.Linear(context.channels, self.width_of(config.layer), bias=False)

    def value(self, r: Reconstruction) -> Tensor:
        z = torch.einsum("bchw,dc->bdhw", r.z.float(), self.project.weight.float())
        maps = on_grid(r.features[self.config.layer].float(), z.shape[-2:])
        cosine, distance = alignment(z, maps, self.config.cos_margin, self.config.distance_margin)
        return self.config.cos_weight * cosine + self.config.distance_weight * distance
