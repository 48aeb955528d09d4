"""Mean squared error of the reconstruction."""

from __future__ import annotations

from torch import Tensor

from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("l2")
class L2(Loss):
    """mean (image - target)^2 over all pixels, images in [-1, 1]."""

    def value(self, r: Reconstruction) -> Tensor:
        return (r.images[0].float() - r.target.float()).square().mean()
