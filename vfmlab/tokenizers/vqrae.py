"""VQRAE: a vision foundation model's last features as codes of high width, and a decoder as deep as it (arXiv
2511.23386).

    images -> encoder (a trainable copy of the run's VFM) -> linear -> quantiser (SimVQ) -> linear -> decoder

Two stages, said by the run: with a frozen encoder everything else learns pixels; then the encoder is tuned,
held where it was by the loss `preservation` with anchor "before". From the paper: SimVQ with 16384 entries of
width 1536, a ViT of the encoder's shape as decoder. Not stated there, so ours: features after the final norm,
positions and norms of the decoder, a frozen codebook with a straight-through gradient.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.registry import DECODERS, QUANTIZERS, TOKENIZERS
from vfmlab.tokenizers.base import CodePosterior, Tokenizer
from vfmlab.tokenizers.shapes import width_on_grid

SO400M = {"width": 1152, "depth": 27, "heads": 16, "hidden": 4304}  # SigLIP2-so400m's


@TOKENIZERS.register("vqrae")
class VQRAE(Tokenizer):
    """Raw latents are the entries chosen: B channels h w on the VFM's grid.

    The encoder's maps are the tokenizer's own, under `encoder.*`: features of the frozen VFM are never read.

    Raises:
        ConfigError: no VFM; a VFM whose grid is not the latent's.
    """

    copied = "encoder"
    last = "quant.weight"

    class Config(config.TokenizerConfig):
        quantised: ClassVar = True

        method: Literal["vqrae"] = "vqrae"
        channels: int = Field(1536, ge=1, description="width of an entry")
        factor: int = Field(16, ge=1, description="spatial down-sampling; must give the VFM's grid")
        layer: int = Field(-1, description="of the encoder, whose map is quantised")
        quantizer: config.AnyQuantizer = Field(default_factory=lambda: QUANTIZERS.get("simvq").Config())
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("vit").Config(**SO400M))

    def __init__(self, config: VQRAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        width = width_on_grid(vfm, config, size, "starts from a vision foundation model")
        channels, side, _ = self.map_shape
        self.encoder = vfm.trainable_copy((config.layer,))
        self.quant, self.post_quant = nn.Conv2d(width, channels, 1), nn.Conv2d(channels, width, 1)
        self.quantizer = QUANTIZERS.get(config.quantizer.kind)(config.quantizer, channels)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, width, side, size)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> CodePosterior:
        maps = self.read_features(images, features, (self.config.layer,))
        return CodePosterior.of(self.quantizer, self.quant(maps[self.config.layer]))

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        return self.decoder(self.post_quant(z))
