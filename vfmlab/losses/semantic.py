"""A latent near to its teacher's code (GAE, 2603.10365), or to its directions (PAE, 2605.07915: SCR)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


def semantic(z: Tensor, code: Tensor, distance: str) -> Tensor:
    """B C h w twice. "l2": mean squared difference; "cosine": 1 - cosine over channels of every place, and of
    the means over places."""
    z, code = z.float(), code.detach().float()
    if distance == "l2":
        return F.mse_loss(z, code)
    places = 1 - F.cosine_similarity(z, code, dim=1).mean()
    return places + 1 - F.cosine_similarity(z.mean((2, 3)), code.mean((2, 3)), dim=1).mean()


@LOSSES.register("semantic")
class Semantic(Loss):
    """Distance of the posterior's mode to the teacher's code, which gets no gradient. GAE: l2, weight 1."""

    class Config(config.LossConfig):
        distance: Literal["l2", "cosine"] = Field("l2", description="cosine: PAE's, of places and of their "
                                                                    "mean")

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        if r.taught is None:
            raise ConfigError(f"losses.{self.name}: this tokenizer has no teacher; use tokenizer.method=gae "
                              "with "
                              "tokenizer.teacher={} and a stage that trains it, or remove the term")
        return semantic(r.posterior.mode(), r.taught.code, self.config.distance)
