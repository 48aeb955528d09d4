"""Loss of a discrete latent: the quantiser's codebook and commitment terms, and an optional entropy term."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


@LOSSES.register("codebook")
class CodebookLoss(Loss):
    """Codebook + beta * commitment, and `entropy` times (entropy of a token - entropy of the mean), UniTok
    2502.20321.

    Needs a tokenizer with a discrete latent, whose posterior carries `codes`; :class:`ConfigError` otherwise.
    """

    class Config(config.LossConfig):
        entropy: float = Field(0.0, ge=0, description="weight of the entropy term inside this loss")

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        codes = getattr(r.posterior, "codes", None)
        if codes is None:
            raise ConfigError("losses.codebook: the tokenizer's latent is continuous; choose a quantised "
                              "tokenizer, set tokenizer.discrete=true where there is that field, or remove "
                              "this loss")
        return codes.loss + self.config.entropy * codes.entropy if self.config.entropy else codes.loss
