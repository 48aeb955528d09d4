"""PAE, the prior-aligned autoencoder (arXiv 2605.07915): a frozen VFM's tokens, mended by a delta encoder
that sees the pixels, squeezed to a few channels of unit RMS.

    images -> frozen VFM -> u;  pixels, u -> delta encoder -> compressor -> RMS norm over channels -> z
    z -> decompressor -> any decoder -> images

Its three priors are loss terms on top of reconstruction: `gram` (structure), `cascade` (continuity under
turns of the tokens on the sphere) and `semantic` with distance cosine (a refined target, here the code of a
teacher made from the VFM as GAE's). From the authors' inference code: the networks. Its training was not
published: weights of the terms, and the teacher in the place of their projector, are ours.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.delta import Compressor, Decompressor, DeltaEncoder, Fusion
from vfmlab.nn.sphere import rms_over_channels, rms_over_image
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.gae import TeacherConfig, teacher_of
from vfmlab.tokenizers.shapes import width_on_grid


@TOKENIZERS.register("pae")
class PAE(Tokenizer):
    """Deterministic latent of length sqrt(C) per token on the VFM's grid; any decoder.

    Raises:
        ConfigError: no VFM, or a latent on another grid; heads that do not divide the VFM's width.
    """

    last = "compressor.conv.weight"

    class Config(config.TokenizerConfig):
        method: Literal["pae"] = "pae"
        channels: int = Field(32, ge=1, description="latent channels")
        factor: int = Field(16, ge=1, description="spatial down-sampling; must give the VFM's grid")
        layer: int = Field(-1, description="VFM layer whose tokens are mended")
        depth: int = Field(6, ge=1, description="blocks of the delta encoder, as wide as the VFM")
        heads: int = Field(16, ge=1, description="of all attention here")
        norm: Literal["token", "image"] = Field("token", description="what has unit RMS: each token, or the "
                                                                     "image")
        fusion: Fusion = Field("sft", description="how pixels and tokens are joined")
        teacher: TeacherConfig | None = Field(None, description="null: none, and no loss `semantic`")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("vit").Config())

    def __init__(self, config: PAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        width = width_on_grid(vfm, config, size, "mends a vision foundation model's tokens")
        self.layers = (config.layer,)
        channels, side, _ = self.map_shape
        if width % config.heads or width % 4:
            raise ConfigError(f"tokenizer.heads {config.heads}: the VFM's width {width} is no multiple of "
                              "it; choose another number")
        patch = vfm.input_size // side
        self.encoder = DeltaEncoder(side, patch, width, config.depth, config.heads, config.fusion)
        self.compressor = Compressor(width, channels, config.heads)
        self.decompressor = Decompressor(channels, width, config.heads)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, width, side, size)
        self.teacher = teacher_of(config.teacher, vfm, channels, side, config.factor)
        self.teacher_layers = () if config.teacher is None else (config.teacher.layer,)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        maps = self.read_features(images, features, self.layers)[self.config.layer].float()
        tokens = self.encoder(self.vfm.prepare(images), maps.flatten(2).transpose(1, 2))
        z = self.compressor(tokens, maps.shape[-2:])
        return Posterior(rms_over_channels(z) if self.config.norm == "token" else rms_over_image(z))

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        return self.decoder(self.decompressor(z))
