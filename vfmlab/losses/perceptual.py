"""Perceptual distance in the feature maps of any frozen vision model: LPIPS without its learned channel
weights.

The offline choice where LPIPS' backbone cannot be had. The judge that scores images is deliberately no
choice: training against the network that measures would make the measurement worthless.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("perceptual")
class Perceptual(Loss):
    """Mean over layers of |u(image) - u(target)|^2 summed over channels, averaged over places and batch.

    u: feature map divided by its norm over channels at every place (as in LPIPS), so each layer's term lies
    in [0, 4].
    """

    autocast = True

    class Config(config.LossConfig):
        model: config.VFM | None = Field(None, description="the vision model; None: the run's own VFM")
        read: tuple[int, ...] | None = Field(None, description="its layers; None: the model's default layers")

    def __init__(self, config: Perceptual.Config, context: LossContext):
        super().__init__(config, context)
        if config.model is None:
            network = self.need_vfm()
        else:
            from vfmlab import vfm  # a floor above: only this option needs it

            network = vfm.build(config.model, context.size)
        self.read = network.check_layers(config.read) if config.read is not None else network.layers
        self.hidden.freeze("network", network)

    def value(self, r: Reconstruction) -> Tensor:
        network = self.hidden["network"]
        ours = network.features(r.images[0], self.read).maps
        theirs = network.features(r.target, self.read).maps
        terms = [(F.normalize(ours[k].float(),
                              dim=1) - F.normalize(theirs[k].float(), dim=1)).square().sum(1).mean()
                 for k in self.read]
        return sum(terms) / len(terms)
