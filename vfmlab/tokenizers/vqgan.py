"""VQGAN: convolutional encoder -> any registered quantiser -> convolutional decoder.

The network of taming transformers (arXiv 2012.09841) and of LlamaGen's tokenizer (2406.06525), which differ
in the quantiser and its width: plain, 1024 entries of width 256, against cosine, 16384 of width 8. LlamaGen's
f16 is width 128, multipliers (1, 1, 2, 2, 4), two residual blocks per resolution in the encoder and three in
the decoder, attention at the lowest resolution.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.registry import DECODERS, QUANTIZERS, TOKENIZERS
from vfmlab.tokenizers.base import CodePosterior, Tokenizer
from vfmlab.tokenizers.plain_vae import ConvEncoderConfig, conv_encoder


@TOKENIZERS.register("vqgan")
class VQGAN(Tokenizer):
    """Looks at pixels only. Raw latents are the entries chosen (B channels h w), `channels` wide.

    Images of other sides divisible by `factor` have codes too; :meth:`decode_codes` takes those of `size`.
    """

    last = "quant.weight"

    class Config(ConvEncoderConfig):
        quantised: ClassVar = True

        method: Literal["vqgan"] = "vqgan"
        channels: int = Field(8, ge=1, description="width of an entry")
        factor: int = Field(16, ge=1, description="spatial down-sampling")
        inner: int | None = Field(256, ge=1, description="channels before the 1x1 convolution to `channels`; "
                                                         "None: as many")
        quantizer: config.AnyQuantizer = Field(default_factory=lambda: QUANTIZERS.get("cosine").Config())

    def __init__(self, config: VQGAN.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        channels, side, _ = self.map_shape
        inner = config.inner or channels
        self.encoder = conv_encoder(config, inner, size, config.width)
        self.quant = nn.Conv2d(inner, channels, 1)
        self.quantizer = QUANTIZERS.get(config.quantizer.kind)(config.quantizer, channels)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> CodePosterior:
        return CodePosterior.of(self.quantizer, self.quant(self.encoder(images)))
