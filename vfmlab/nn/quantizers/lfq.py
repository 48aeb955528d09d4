"""Look-up-free quantisation: a token's code is the signs of its channels (MAGVIT-v2, 2310.05737)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.quantizers.base import Quantised, Quantizer, straight_through
from vfmlab.registry import QUANTIZERS

MOST_BITS = 20  # the entropy is taken over all 2^bits entries


@QUANTIZERS.register("lfq")
class LFQ(Quantizer):
    """Entries are the corners (-1, 1)^C; the first channel is the most significant bit of an index.

    Loss `commitment` |z - sg(q)|^2, 0 in the paper; the entropy term, mean H(p) - gamma H(mean p), is
    weighted by losses.codebook.entropy, 0.1 in the paper. Without it nothing makes tokens decided and use
    even.

    Raises:
        ConfigError: more channels than 20.
    """

    class Config(config.QuantizerConfig):
        kind: Literal["lfq"] = "lfq"
        commitment: float = Field(0.0, ge=0, description="weight of the commitment term")
        gamma: float = Field(1.0, ge=0, description="weight of even use inside the entropy")
        inverse_temperature: float = Field(100.0, gt=0, description="of the soft assignment")
        floor: float = Field(1e-5, gt=0, description="least probability inside the logarithms")

    def __init__(self, config: LFQ.Config, channels: int):
        if channels > MOST_BITS:
            raise ConfigError(f"tokenizer.channels {channels}: lfq has 2^channels entries and all are "
                              f"counted; at most {MOST_BITS}")
        super().__init__(config, channels, 2**channels)
        self.register_buffer("bit", 2 ** torch.arange(channels - 1, -1, -1), persistent=False)
        self.track()

    def quantise(self, x: Tensor) -> Quantised:
        positive = x > 0
        chosen = torch.where(positive, 1.0, -1.0)
        indices = (positive.long() * self.bit).sum(-1)

        def entropy() -> Tensor:
            logits = 2 * self.config.inverse_temperature * (x.flatten(0, -2) @ self.table().t())
            share = logits.softmax(-1)
            return self._entropy(share).mean() - self.config.gamma * self._entropy(share.mean(0))

        loss = self.config.commitment * F.mse_loss(x, chosen)
        return Quantised(straight_through(x, chosen), indices, loss, self.count(indices), entropy)

    def _entropy(self, share: Tensor) -> Tensor:
        return -(share * share.clamp_min(self.config.floor).log()).sum(-1)

    def table(self) -> Tensor:
        return self.rows(torch.arange(self.size, device=self.bit.device))

    def rows(self, indices: Tensor) -> Tensor:
        return ((indices[..., None] & self.bit) > 0).float() * 2 - 1
