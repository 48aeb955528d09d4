"""The structure of a latent near to a VFM map's: Gram matrices of tokens (PAE, arXiv 2605.07915: SSR)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.losses.vf import on_grid
from vfmlab.registry import LOSSES


def gram(maps: Tensor) -> Tensor:
    """Cosines between all tokens of an image: B C h w -> B N N."""
    unit = F.normalize(maps.float().flatten(2), dim=1, eps=1e-8)
    return unit.transpose(1, 2) @ unit


@LOSSES.register("gram")
class Gram(Loss):
    """Squared Frobenius distance of the Gram matrices of latent and VFM map over their number of entries.

    Reads the posterior's mode and `r.features`, on the latent's grid. Cosines, so that widths and lengths do
    not count, and the mean over pairs in place of the sum are ours: the paper's scaling is not published.
    """

    class Config(config.LossConfig):
        layer: int = Field(-1, description="VFM layer that is compared with")

    on_images = False

    def __init__(self, config: Gram.Config, context: LossContext):
        super().__init__(config, context)
        self.width_of(config.layer)  # an error where there is no such layer
        self.layers = (config.layer,)

    def value(self, r: Reconstruction) -> Tensor:
        z = r.posterior.mode()
        target = on_grid(r.features[self.config.layer].float(), z.shape[-2:])
        return (gram(z) - gram(target).detach()).square().mean()
