"""Tokens in the direction of the untouched VFM's, at any length (HAE, arXiv 2601.22904)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.losses.preservation import preservation
from vfmlab.registry import LOSSES


@LOSSES.register("token_cosine")
class TokenCosine(Loss):
    """1 - cosine of the posterior's mode and the VFM's map, which must be as wide; HAE: weight 0.5."""

    class Config(config.LossConfig):
        layer: int = Field(-1, description="VFM layer that is compared with")

    on_images = False

    def __init__(self, config: TokenCosine.Config, context: LossContext):
        super().__init__(config, context)
        self.layers = (config.layer,)
        width = self.width_of(config.layer)
        if width != context.channels:
            raise ConfigError("losses.token_cosine compares tokens one to one: the latent has "
                              f"{context.channels} channels, the VFM's layer {config.layer} {width}; use "
                              "tokenizer.method=dino_sae, or the loss vf, which has a linear map in between")

    def value(self, r: Reconstruction) -> Tensor:
        return preservation(r.posterior.mode(), r.features[self.config.layer], "cosine")
