"""HAE, the hyperspherical autoencoder, first called DINO-SAE (arXiv 2601.22904): a frozen VFM reads images
through a convolutional stem of the tokenizer's own, and its patch tokens are the latent.

    images -> stem -> frozen VFM behind its patch embedding -> tokens (B C h w) -> DC-AE decoder -> images

Stage one trains stem and decoder with the loss `token_cosine` against the untouched VFM's tokens, so that
direction stays meaning and length may carry detail. Stages that leave the stem alone train the decoder on
tokens with noise: z + s n, with one s ~ U(0, tau) a *batch*, tau rising from `noise` to `noise_end` over
`noise_rise` images. Nothing inside is on a sphere; the diffusion model's latents are (`radius`), and decoding
gives them the length `decode_length`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.dc_blocks import ConvStem
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.shapes import check_whole, width_on_grid


@TOKENIZERS.register("dino_sae")
class DinoSAE(Tokenizer):
    """Deterministic latent as wide as the VFM, on its grid; any decoder (default: `dc_ae`).

    Raises:
        ConfigError: no VFM; channels or grid that are not the VFM's; a factor that is no power of two.
    """

    class Config(config.TokenizerConfig):
        method: Literal["dino_sae"] = "dino_sae"
        channels: int = Field(1024, ge=1, description="must be the VFM's width")
        factor: int = Field(16, ge=2, description="spatial down-sampling; must give the VFM's grid")
        layer: int = Field(-1, description="the VFM layer that is the latent: behind its final norm")
        stem: tuple[int, ...] = Field((64, 128, 256), description="widths of the stem's convolutions of "
            "stride 2, but the last, which is the VFM's")
        noise: float = Field(0.0, ge=0, description="tau of the decoder's training noise, at first")
        noise_end: float = Field(0.0, ge=0, description="tau after its rise; HAE: 0.8 to 1.2")
        noise_rise: int = Field(0, ge=0, description="images over which tau rises; 0: it stays at `noise`")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("dc_ae").Config())

    def __init__(self, config: DinoSAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        width = width_on_grid(vfm, config, size, "encodes with a vision foundation model")
        check_whole(width, config, config.layer)
        if 2 ** (len(config.stem) + 1) != config.factor:
            raise ConfigError(f"tokenizer.stem {list(config.stem)}: {len(config.stem) + 1} convolutions of "
                              f"stride 2 give f{2 ** (len(config.stem) + 1)}, tokenizer.factor is "
                              f"{config.factor}")
        self.stem, self.last = ConvStem(vfm.width(1), config.stem), f"stem.convs.{len(config.stem)}.weight"
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, width, self.map_shape[1], size)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        tokens = self.stem(images)
        return Posterior(self.vfm.features_from(images, tokens, (self.config.layer,)).maps[self.config.layer])

    def tau(self, samples: int) -> float:
        """Of the training noise after `samples` images of a stage."""
        c = self.config
        done = min(1.0, samples / c.noise_rise) if c.noise_rise else 0.0
        return c.noise + (c.noise_end - c.noise) * done

    def perturb(self, z: Tensor, rng: StepRandom) -> Tensor:
        if any(parameter.requires_grad for parameter in self.stem.parameters()):
            return z
        return z + self.tau(rng.samples) * rng.number() * rng.randn(*z.shape[1:])
