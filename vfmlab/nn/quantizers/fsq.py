"""Finite scalar quantisation: each channel is bounded and rounded to a few levels (arXiv 2309.15505)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.quantizers.base import Quantised, Quantizer, straight_through
from vfmlab.registry import QUANTIZERS

LARGEST = 2**20  # entries that are counted one by one


@QUANTIZERS.register("fsq")
class FSQ(Quantizer):
    """Channel i has levels[i] values in [-1, 1]; every product of them is an entry. Nothing is learned and
    there is no loss.

    The first channel is the fastest digit of an index. Level sets of the paper (table 1) for about 2^8, 2^10,
    2^12, 2^14, 2^16 entries: 8 6 5; 8 5 5 5; 7 5 5 5 5; 8 8 8 6 5; 8 8 8 5 5 5.

    Raises:
        ConfigError: another number of channels than of levels, too many entries.
    """

    class Config(config.QuantizerConfig):
        kind: Literal["fsq"] = "fsq"
        levels: tuple[int, ...] = Field((8, 8, 8, 6, 5), min_length=1, description="of each channel")

        @field_validator("levels")
        @classmethod
        def _two(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
            if min(levels) < 2 or math.prod(levels) > LARGEST:
                raise ValueError(f"every channel needs 2 levels or more, and all together at most {LARGEST} "
                                 "entries")
            return levels

    def __init__(self, config: FSQ.Config, channels: int):
        if channels != len(config.levels):
            raise ConfigError(f"tokenizer.channels {channels}: fsq has one channel for each of its levels "
                              f"{list(config.levels)}; set tokenizer.channels={len(config.levels)}")
        super().__init__(config, channels, math.prod(config.levels))
        levels = torch.tensor(config.levels)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("step", torch.cat([levels.new_ones(1), levels[:-1].cumprod(0)]),
                             persistent=False)
        self.track()

    def bounded(self, x: Tensor) -> Tensor:
        """Tokens B N C -> values whose roundings are the levels: (L - 1) / 2 times a shifted tanh."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)  # an even number of levels is not symmetric
        return torch.tanh(x + torch.atanh(offset / half)) * half - offset

    def quantise(self, x: Tensor) -> Quantised:
        bounded, width = self.bounded(x), self.levels // 2
        rounded = bounded.round()
        indices = ((rounded.long() + width) * self.step).sum(-1)
        latent = straight_through(bounded, rounded) / width
        return Quantised(latent, indices, x.new_zeros(()), self.count(indices))

    def table(self) -> Tensor:
        return self.rows(torch.arange(self.size, device=self.levels.device))

    def rows(self, indices: Tensor) -> Tensor:
        width = self.levels // 2
        digits = indices[..., None] // self.step % self.levels
        return (digits - width).float() / width
