"""Plain vector quantisation: the nearest entry of a learned codebook (VQ-VAE, arXiv 1711.00937; VQGAN,
2012.09841)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.nn.quantizers.base import Quantised, Quantizer, nearest, pull, soft_entropy, straight_through
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("vq")
class VectorQuantizer(Quantizer):
    """Loss |sg(z) - e|^2 + beta |z - sg(e)|^2. `legacy`: beta on the other term, as VQGAN's release has it by
    default, which makes the commitment four times as strong as the codebook term instead of a quarter.
    """

    class Config(config.QuantizerConfig):
        kind: Literal["vq"] = "vq"
        size: int = Field(1024, ge=2, description="entries")
        beta: float = Field(0.25, ge=0, description="weight of the commitment term")
        legacy: bool = Field(False, description="beta on the codebook term instead")
        temperature: float = Field(0.01, gt=0, description="squared distances are divided by it in the "
                                                           "entropy")
        floor: float = Field(1e-5, gt=0, description="added inside the logarithm of the mean assignment")

    def __init__(self, config: VectorQuantizer.Config, channels: int):
        super().__init__(config, channels, config.size)
        span = 1 / config.size
        self.weight = nn.Parameter(torch.empty(config.size, channels).uniform_(-span, span))
        self.track()

    def entries(self) -> Tensor:
        return self.weight.float()

    def quantise(self, x: Tensor) -> Quantised:
        entries, beta = self.entries(), self.config.beta
        indices = nearest(x, entries)
        chosen = entries[indices]

        def entropy() -> Tensor:
            # but for |x|^2, which the softmax drops
            distance = entries.square().sum(-1) - 2 * (x @ entries.t())
            return soft_entropy(-distance / self.config.temperature, self.config.floor)

        loss = pull(x, chosen, *((beta, 1.0) if self.config.legacy else (1.0, beta)))
        return Quantised(straight_through(x, chosen), indices, loss, self.count(indices), entropy)
