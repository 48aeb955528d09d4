"""Cosine vector quantisation: tokens and entries on the unit sphere, the nearest by angle.

ViT-VQGAN (arXiv 2110.04627); the rule of LlamaGen (2406.06525), VFMTok (2507.08441) and TiTok (2406.07550).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.nn.quantizers.base import Quantised, Quantizer, nearest, pull, soft_entropy, straight_through
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("cosine")
class CosineQuantizer(Quantizer):
    """z and e are L2-normalised; what leaves has unit length. Loss |sg(z) - e|^2 + beta |z - sg(e)|^2.

    The codebook is learned by gradient: no moving average, no restarts. Rows are normalised at every use, so
    their stored lengths are free.
    """

    class Config(config.QuantizerConfig):
        kind: Literal["cosine"] = "cosine"
        size: int = Field(16_384, ge=2, description="entries")
        beta: float = Field(0.25, ge=0, description="weight of the commitment term")
        temperature: float = Field(0.01, gt=0, description="squared distances are divided by it in the "
                                                           "entropy")
        floor: float = Field(1e-5, gt=0, description="added inside the logarithm of the mean assignment")

    def __init__(self, config: CosineQuantizer.Config, channels: int):
        super().__init__(config, channels, config.size)
        self.weight = nn.Parameter(torch.randn(config.size, channels) / channels**0.5)
        self.track()

    def entries(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1)

    def quantise(self, x: Tensor) -> Quantised:
        x, entries = F.normalize(x, dim=-1), self.entries()
        indices = nearest(x, entries)
        chosen = entries[indices]

        def entropy() -> Tensor:
            # |x - e|^2 = 2 - 2 cos for unit vectors; the constant drops out of the softmax.
            return soft_entropy(2 * (x @ entries.t()) / self.config.temperature, self.config.floor)

        loss = pull(x, chosen, 1.0, self.config.beta)
        return Quantised(straight_through(x, chosen), indices, loss, self.count(indices), entropy)
