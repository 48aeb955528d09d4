"""Reconstruction of the vision foundation model's own maps (FAE, arXiv 2512.07829, eq. 4.1; with a cosine:
PS-VAE, 2512.17909)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("feature_reconstruction")
class FeatureReconstruction(Loss):
    """l2 * mean squared error + cosine * (1 - cosine over channels), means over places and images, summed
    over `r.rebuilt`'s layers.

    Compares `r.rebuilt` (what the tokenizer's feature decoder makes of the sampled latent) with `r.features`.
    FAE: l2 alone, as a sum over channels and places; the mean here keeps weights comparable over sizes.
    """

    class Config(config.LossConfig):
        l2: float = Field(1.0, ge=0)
        cosine: float = Field(0.0, ge=0)

    on_images = False

    def __init__(self, config: FeatureReconstruction.Config, context: LossContext):
        super().__init__(config, context)
        self.need_vfm()
        if not config.l2 and not config.cosine:
            raise ConfigError("losses.feature_reconstruction: l2 and cosine are both 0, so it asks for "
                              "nothing; set one of them")

    def value(self, r: Reconstruction) -> Tensor:
        if not r.rebuilt:
            raise ConfigError("losses.feature_reconstruction: this tokenizer rebuilds no features; use "
                              "tokenizer.method=fae or remove the term")
        total = r.z.new_zeros(())
        for layer, ours in r.rebuilt.items():
            ours, theirs = ours.float(), r.features[layer].float()
            if self.config.l2:
                total = total + self.config.l2 * F.mse_loss(ours, theirs)
            if self.config.cosine:
                total = total + self.config.cosine * (1 - F.cosine_similarity(ours, theirs, dim=1)).mean()
        return total
