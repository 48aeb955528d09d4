"""Structural similarity as a loss (VFM-VAE's stage 2)."""

from __future__ import annotations

from torch import Tensor

from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("ssim")
class SSIM(Loss):
    """1 - SSIM (Wang et al. 2004), Gaussian window of sigma 1.5 (11 px), data range 2, averaged over the
    batch.

    Images under 11 px, which equivariance scaling can produce, get the widest window that fits.
    """

    def value(self, r: Reconstruction) -> Tensor:
        # Imported here: torchmetrics takes seconds to import, and reading a config fills the table of losses.
        from torchmetrics.functional.image import structural_similarity_index_measure

        image, target = r.images[0].float(), r.target.float()
        # torchmetrics cuts int(3.5 sigma + 0.5) pixels off each border; more than half the side would leave
        # nothing.
        border = min(5, (min(image.shape[-2:]) - 1) // 2)
        sigma = 1.5 if border == 5 else max(border - 0.25, 0.2) / 3.5
        return 1 - structural_similarity_index_measure(image, target, sigma=sigma, data_range=2.0)
