"""A codebook of moving averages on the unit sphere (BEiT v2, arXiv 2208.06366)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab.nn.quantizers.base import EntriesConfig, Quantised, Quantizer, over_ranks
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("ema")
class EMAQuantizer(Quantizer):
    """The cosine rule, with loss beta |z - sg(e)|^2 alone. After each training batch every entry that it used
    moves: e = normalise(decay e + (1 - decay) normalise(mean of its tokens)); the others stay. A batch is
    what one call sees on all processes together: training refuses to cut it into accumulation steps.
    """

    class Config(EntriesConfig):
        whole_batch: ClassVar = True

        kind: Literal["ema"] = "ema"
        size: int = Field(8192, ge=2, description="entries")
        beta: float = Field(1.0, ge=0, description="weight of the commitment term")
        decay: float = Field(0.99, ge=0, lt=1)

    def __init__(self, config: EMAQuantizer.Config, channels: int):
        super().__init__(config, channels, config.size)
        self.register_buffer("weight", F.normalize(torch.randn(config.size, channels), dim=-1))
        self.track()

    def table(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1)

    def quantise(self, x: Tensor) -> Quantised:
        x = F.normalize(x, dim=-1)
        result = self.assign(x, 0.0, self.config.beta, unit=True)
        if self.training:
            self._move(x.detach(), result.indices)
        return result

    @torch.no_grad()
    def _move(self, x: Tensor, indices: Tensor) -> None:
        total = x.new_zeros(self.size, self.channels).index_add_(0, indices.flatten(), x.flatten(0, -2))
        ones = x.new_ones(indices.numel())
        used = over_ranks(x.new_zeros(self.size).index_add_(0, indices.flatten(), ones)) > 0
        mean = F.normalize(over_ranks(total), dim=-1)  # of the sum: the length does not matter
        moved = torch.lerp(mean, self.weight.float(), self.config.decay)
        self.weight.copy_(torch.where(used[:, None], F.normalize(moved, dim=-1), self.weight))
