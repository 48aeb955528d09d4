"""Epsilon-VAE (arXiv 2410.04081): a convolutional encoder and a decoder that denoises in one to three steps.

The latent is deterministic: the paper mentions no KL. Losses: `denoising` (of the velocity), `lpips` and
others on the clean estimate of a random time, which stands for the decoded image in training; `adversarial`
with a discriminator of kind `trajectory`, which judges pairs of estimate and noisy state. `decode` takes a
seed for each image; without one, all have seed 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.decoders.diffusion import Denoised, DiffusionDecoder
from vfmlab.errors import ConfigError
from vfmlab.nn.conv_blocks import ConvEncoder, levels
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer


@TOKENIZERS.register("epsilon_vae")
class EpsilonVAE(Tokenizer):
    """Deterministic latent; the decoder must be of kind `diffusion`."""

    last = "encoder.conv_out.weight"

    class Config(config.TokenizerConfig):
        seeded: ClassVar = True

        method: Literal["epsilon_vae"] = "epsilon_vae"
        width: int = Field(128, ge=1, description="encoder channels at the finest resolution")
        multipliers: tuple[int, ...] | None = Field(None, description="widths per resolution over `width`, "
                                                                      "finest first")
        blocks: int = Field(2, ge=1, description="residual blocks per resolution of the encoder")
        attention: tuple[int, ...] = Field((16,), description="sides in pixels with attention after every "
                                                              "block")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("diffusion").Config())

    def __init__(self, config: EpsilonVAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        channels, side, _ = self.map_shape
        widths = levels(config.width, config.multipliers, config.factor, "tokenizer")
        self.encoder = ConvEncoder(channels, config.factor, size, widths, config.blocks, config.attention)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)
        if not isinstance(self.decoder, DiffusionDecoder):
            raise ConfigError(f"tokenizer.decoder.kind {config.decoder.kind}: 'epsilon_vae' decodes by "
                              "denoising; use decoder.kind=diffusion, or tokenizer.method=plain_vae")

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        return Posterior(self.encoder(images))

    def decode_raw(self, z: Tensor, seeds: Sequence[int] | None = None) -> list[Tensor]:
        return self.decoder(z, seeds)

    def decode_in_training(self, z: Tensor, target: Tensor,
                           rng: StepRandom) -> tuple[list[Tensor], Denoised | None]:
        denoised = self.decoder.denoise(z, target, rng)
        return [denoised.image], denoised
