"""Feature matching: the decoder imitates the discriminator's maps of the real image (1711.11585, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.losses.adversarial import Scheduled, outputs_of
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


def feature_matching(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """4 / layers * sum over layers of mean |fake - real|, averaged over scales; fp32, no gradients into
    `real`.

    Args:
        fake, real: the maps of each scale without its logits. The released code's factor 4 / (n_layers + 1)
            is 1 for three layers of stride 2, which have four maps.
    """
    scales = [4 / len(ours) * sum((a.float() - b.detach().float()).abs().mean()
                                  for a, b in zip(ours, theirs, strict=True))
              for ours, theirs in zip(fake, real, strict=True)]
    return sum(scales) / len(scales)


@LOSSES.register("feature_matching")
class FeatureMatching(Loss):
    """On the maps of the discriminator of the adversarial term `of`. VFM-VAE's weight is 10."""

    class Config(Scheduled):
        of: str = Field("adversarial", description="the adversarial term whose discriminator is read")

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        outputs = outputs_of(r, self.name, self.config.of)
        if not outputs.fake_features:
            raise ConfigError(f"losses.{self.name}: the discriminator of losses.{self.config.of} returned no "
                              "maps")
        return feature_matching(outputs.fake_features, outputs.real_features)
