"""The plain convolutional KL autoencoder (SD-VAE's network) at any factor and width, and VA-VAE, which is the
same net.

arXiv 2112.10752 (appendix D) and 2501.01423. The published f16d32 net is width 128, multipliers (1, 1, 2, 2,
4), two residual blocks per resolution, attention at 16 px.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.conv_blocks import ConvEncoder, levels
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.linear_start import LinearStart


class ConvEncoderConfig(config.TokenizerConfig):
    """Options of the convolutional encoder, and the decoder beside it."""

    width: int = Field(128, ge=1, description="encoder channels at the finest resolution")
    multipliers: tuple[int, ...] | None = Field(
        None, description="widths per resolution over `width`, finest first; None: the usual ones for the "
                          "factor"
    )
    blocks: int = Field(2, ge=1, description="residual blocks per resolution of the encoder")
    attention: tuple[int, ...] = Field((16,), description="sides in pixels with attention after every block")
    middle: bool = Field(True, description="two more residual blocks at the latent's resolution")
    middle_attention: bool = Field(True, description="attention between those two")
    inner: int | None = Field(None, ge=1, description="channels before the last 1x1 convolution, for each of "
                                                      "mean and log-variance; None: those of the latent")
    patch: int = Field(1, ge=1, description="the image is pixel-unshuffled by this much first: faster")
    decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("conv").Config())


def conv_encoder(config: ConvEncoderConfig, out: int, size: int, first: int | None = None) -> ConvEncoder:
    """Images B 3 `size` `size` -> B `out` h w; :class:`ConfigError` for a patch that does not fit."""
    if config.factor % config.patch:
        raise ConfigError(f"tokenizer.patch {config.patch} does not divide tokenizer.factor {config.factor}; "
                          "choose a divisor")
    widths = levels(config.width, config.multipliers, config.factor // config.patch, "tokenizer")
    return ConvEncoder(
        out, config.factor, size, widths, config.blocks, config.attention, config.middle,
        config.middle_attention, config.patch, first,
    )  # fmt: skip


@TOKENIZERS.register("plain_vae")
class PlainVAE(Tokenizer):
    """Convolutional encoder -> diagonal Gaussian -> any registered decoder (default: its convolutional mirror
    image).

    Looks at pixels only; the run's VFM, if any, is used by losses. Accepts images of any side divisible by
    `factor`.
    """

    last = "quant.weight"

    class Config(ConvEncoderConfig):
        method: Literal["plain_vae"] = "plain_vae"
        linear_start: bool = Field(False,
                                   description="linear patch paths, fitted before training (linear_start.py)")

    def __init__(self, config: PlainVAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        channels, side, _ = self.latent_shape
        inner = 2 * (config.inner or channels)
        self.encoder = conv_encoder(config, inner, size)
        self.quant = nn.Conv2d(inner, 2 * channels, 1)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)
        if config.linear_start:
            self.start = LinearStart(channels, config.factor)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        mean, logvar = self.quant(self.encoder(images)).chunk(2, dim=1)
        return self.gaussian(mean, logvar, images)


@TOKENIZERS.register("va_vae")
class VAVAE(PlainVAE):
    """VA-VAE (arXiv 2501.01423): the network of `plain_vae`, aligned with a VFM by the loss `vf`.

    The run must have a `vfm` section (the paper: DINOv2-L/14) and the loss `vf` (the paper: weight 0.1,
    adaptive, margins cos 0.5 and distance 0.25); that loss refuses a run without a VFM. Encoding needs no
    VFM.
    """

    class Config(PlainVAE.Config):
        method: Literal["va_vae"] = "va_vae"  # type: ignore[assignment]
