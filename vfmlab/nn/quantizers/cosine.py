"""Cosine vector quantisation: tokens and entries on the unit sphere, the nearest by angle.

ViT-VQGAN (arXiv 2110.04627); the rule of LlamaGen (2406.06525), VFMTok (2507.08441) and TiTok (2406.07550).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.quantizers.base import EntriesConfig, Quantised, Quantizer
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("cosine")
class CosineQuantizer(Quantizer):
    """z and e are L2-normalised; what leaves has unit length. Loss |sg(z) - e|^2 + beta |z - sg(e)|^2.

    The codebook is learned by gradient: no moving average, no restarts. Rows are normalised at every use, so
    their stored lengths are free.
    """

    class Config(EntriesConfig):
        kind: Literal["cosine"] = "cosine"

    def __init__(self, config: CosineQuantizer.Config, channels: int):
        super().__init__(config, channels, config.size)
        self.weight = nn.Parameter(torch.randn(config.size, channels) / channels**0.5)
        self.track()

    def table(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1)

    def quantise(self, x: Tensor) -> Quantised:
        return self.assign(F.normalize(x, dim=-1), 1.0, self.config.beta, unit=True)
