"""Mean absolute error of the reconstruction."""

from __future__ import annotations

from torch import Tensor

from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("l1")
class L1(Loss):
    """mean |image - target| over all pixels, images in [-1, 1]."""

    def value(self, r: Reconstruction) -> Tensor:
        return (r.images[0].float() - r.target.float()).abs().mean()
