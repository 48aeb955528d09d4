"""Flow matching of a decoder that denoises images (Epsilon-VAE, arXiv 2410.04081)."""

from __future__ import annotations

from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("denoising")
class Denoising(Loss):
    """Mean squared error of the velocity that the decoder predicts of a noisy image."""

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        if r.denoising is None:
            raise ConfigError(f"losses.{self.name}: this tokenizer's decoder does not denoise; use "
                              "tokenizer.method=epsilon_vae, or remove the term")
        return r.denoising.error.mean()
