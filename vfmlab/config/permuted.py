"""Codes in other orders than raster order, in training."""

from __future__ import annotations

from pydantic import Field, model_validator

from vfmlab.config.section import Section


class Permuted(Section):
    """Training on the codes in random orders (RAR, arXiv 2411.00776), more and more in raster order.

    Each image takes a random order with a chance that is 1 up to `until` images and falls to 0 at `raster`.
    """

    until: int = Field(..., ge=0, description="images seen up to which every order is random")
    raster: int = Field(..., ge=1, description="images seen from which every order is raster order")

    @model_validator(mode="after")
    def _forward(self) -> Permuted:
        if self.raster < self.until:
            raise ValueError(f"until {self.until} is after raster {self.raster}; give until <= raster")
        return self

    def chance(self, samples: int) -> float:
        """Of a random order after `samples` images."""
        if samples < self.until:
            return 1.0
        return max(0.0, 1 - (samples - self.until) / max(1, self.raster - self.until))
