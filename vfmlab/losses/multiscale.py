"""L1 on the decoder's lower-resolution outputs (VFM-VAE, 2510.18457: weight 0.1, first 5 M images)."""

from __future__ import annotations

from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.nn.transforms import resize
from vfmlab.registry import LOSSES


@LOSSES.register("multiscale")
class Multiscale(Loss):
    """Sum over the lower-resolution outputs of mean |output - target scaled down|, bilinear with
    anti-aliasing.

    Raises :class:`ConfigError` for a decoder that has no such outputs, where the term would silently be
    nothing.
    """

    def value(self, r: Reconstruction) -> Tensor:
        if len(r.images) < 2:
            raise ConfigError("loss 'multiscale' needs a decoder with lower-resolution outputs, and this one "
                              "gives a single image; remove losses.multiscale or choose "
                              "tokenizer.decoder.kind=progressive")
        return sum((image.float() - resize(r.target, image.shape[-1])).abs().mean() for image in r.images[1:])
