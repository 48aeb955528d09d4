"""SimVQ: the codebook is a linear map of frozen random vectors (arXiv 2411.02038).

Every step of the map moves every entry, chosen or not, so entries that nobody uses do not stay behind.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.quantizers.base import EntriesConfig, Quantised, Quantizer
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("simvq")
class SimVQ(Quantizer):
    """Entries C W^T (+ b), C ~ N(0, 1/d) frozen; nearest by Euclidean distance, nothing is normalised.

    Loss |sg(z) - q|^2 + beta |z - sg(q)|^2, as the paper has it; `legacy`: beta on the other term.
    """

    class Config(EntriesConfig):
        kind: Literal["simvq"] = "simvq"
        legacy: bool = Field(False, description="beta on the codebook term instead")
        frozen: bool = Field(True, description="only the map is trained; false: the vectors too")
        bias: bool = Field(False, description="of the map: the paper has none, its release one")
        estimator: Literal["straight_through", "rotation"] = Field(
            "straight_through", description="gradient of the input: handed over, or turned with it")

    def __init__(self, config: SimVQ.Config, channels: int):
        super().__init__(config, channels, config.size)
        vectors = torch.randn(config.size, channels) / channels**0.5
        if config.frozen:
            self.register_buffer("vectors", vectors)
        else:
            self.vectors = nn.Parameter(vectors)
        self.map = nn.Linear(channels, channels, bias=config.bias)
        self.track()

    def table(self) -> Tensor:
        bias = None if self.map.bias is None else self.map.bias.float()
        return F.linear(self.vectors.float(), self.map.weight.float(), bias)

    def quantise(self, x: Tensor) -> Quantised:
        weights = (self.config.beta, 1.0) if self.config.legacy else (1.0, self.config.beta)
        return self.assign(x, *weights, turn=rotated if self.config.estimator == "rotation" else None)


def rotated(x: Tensor, chosen: Tensor) -> Tensor:
    """x (B N d) turned and scaled onto `chosen`, the turn held constant: the gradient is turned back (the
    rotation trick, arXiv 2410.06424, eq. 4).
    """
    with torch.no_grad():
        u, v = F.normalize(x, dim=-1, eps=1e-6), F.normalize(chosen, dim=-1, eps=1e-6)
        w = F.normalize(u + v, dim=-1, eps=1e-6)
        scale = chosen.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    along = (x * w).sum(-1, keepdim=True) * w, (x * u).sum(-1, keepdim=True) * v
    return scale * (x - 2 * along[0] + 2 * along[1])
