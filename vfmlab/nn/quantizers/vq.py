"""Vector quantisation: the nearest entry of a learned codebook (VQ-VAE 1711.00937; VQGAN 2012.09841)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vfmlab.nn.quantizers.base import EntriesConfig, Quantised, Quantizer
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("vq")
class VectorQuantizer(Quantizer):
    """Loss |sg(z) - e|^2 + beta |z - sg(e)|^2. `legacy`: beta on the other term, as VQGAN's release has it by
    default, which makes the commitment four times as strong as the codebook term instead of a quarter.
    """

    class Config(EntriesConfig):
        kind: Literal["vq"] = "vq"
        size: int = Field(1024, ge=2, description="entries")
        legacy: bool = Field(False, description="beta on the codebook term instead")

    def __init__(self, config: VectorQuantizer.Config, channels: int):
        super().__init__(config, channels, config.size)
        span = 1 / config.size
        self.weight = nn.Parameter(torch.empty(config.size, channels).uniform_(-span, span))
        self.track()

    def table(self) -> Tensor:
        return self.weight.float()

    def quantise(self, x: Tensor) -> Quantised:
        weights = (self.config.beta, 1.0) if self.config.legacy else (1.0, self.config.beta)
        return self.assign(x, *weights)
