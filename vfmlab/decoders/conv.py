"""The convolutional decoder of the latent-diffusion autoencoder (SD-VAE, VA-VAE): latent -> one image."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.conv_blocks import ConvUpsampler, levels
from vfmlab.registry import DECODERS


@DECODERS.register("conv")
class ConvDecoder(nn.Module):
    """1x1 convolution, then residual blocks and nearest-neighbour up-sampling (arXiv 2112.10752, appendix D).

    `forward(z)`: raw latents B C h w -> [images B 3 h*f w*f], any h, w (attention included), unbounded range.

    Args:
        config: see `Config`. latent_channels, latent_side: of z. size: side of the images in pixels.
    """

    last = "net.conv_out.weight"

    class Config(config.DecoderConfig):
        kind: Literal["conv"] = "conv"
        width: int = Field(128, ge=1, description="channels at the finest resolution")
        multipliers: tuple[int, ...] | None = Field(
            None, description="widths per resolution over `width`, finest first; None: the usual ones for "
                              "the factor"
        )
        blocks: int = Field(3, ge=1,
                            description="residual blocks per resolution (one more than in the encoder)")
        attention: tuple[int, ...] = Field((16,),
                                           description="sides in pixels with attention after every block")
        middle: bool = Field(True, description="two more residual blocks at the latent's resolution")
        middle_attention: bool = Field(True, description="attention between those two")
        inner: int | None = Field(None, ge=1,
                                  description="channels after the first 1x1 convolution; None: those of z")
        patch: int = Field(1, ge=1,
                           description="the last up-sampling, by this much, is a pixel-shuffle: faster")

    def __init__(self, config: ConvDecoder.Config, latent_channels: int, latent_side: int, size: int):
        super().__init__()
        if size % latent_side or (size // latent_side) % config.patch:
            raise ConfigError(f"decoder.patch {config.patch}: {size} px from a {latent_side} px latent need "
                              "a factor that is whole and divisible by it; choose data.size, "
                              "tokenizer.factor and decoder.patch accordingly")
        factor, inner = size // latent_side, config.inner or latent_channels
        widths = levels(config.width, config.multipliers, factor // config.patch, "decoder")
        self.post_quant = nn.Conv2d(latent_channels, inner, 1)
        self.net = ConvUpsampler(
            inner, factor, size, widths, config.blocks, config.attention, config.middle, config.middle_attention,
            config.patch,
        )  # fmt: skip

    def forward(self, z: Tensor) -> list[Tensor]:
        return [self.net(self.post_quant(z))]
