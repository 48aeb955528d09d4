"""KL divergence of the posterior to the standard normal prior."""

from __future__ import annotations

from torch import Tensor

from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("kl")
class KL(Loss):
    """Summed over C, H, W (nats per image), mean over the batch; published weight 1e-6. 0 without logvar."""

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        return r.posterior.kl().mean()
