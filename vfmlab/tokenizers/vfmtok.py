"""VFMTok: region tokens of a frozen vision foundation model as codes (arXiv 2507.08441).

    VFM maps of several depths -> region tokens (learned queries, deformable attention) -> quantiser
        -> causal transformer -> grid of pixels' tokens -> convolutions -> image
                              -> grid of features' tokens -> the VFM's last map, for the feature loss

The paper's ablations are options: `levels` of vfm.layers [the last of these is what the feature loss
rebuilds], `tokens`, `attends` cross (all places of all levels; the paper's has a window of 16 x 16), `shared`
off, `masks` shared, `registers` 0, `encoder` random, and no feature loss [losses.feature_reconstruction=0].
With a random encoder the feature loss still rebuilds the true VFM's last level: in the paper its linear probe
is 59, of 69 with the VFM and 23 without the feature loss. A random VFM [vfm.weights=random] is the target
too: a control of ours. How the paper draws its random encoder is unknown; here it is the VFM's architecture
with the weights of vfm.weights=random, vfm.seed=0, drawn again whenever the tokenizer is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.conv_blocks import ConvUpsampler, levels
from vfmlab.nn.regions import Attends, RegionDecoder, RegionEncoder
from vfmlab.registry import QUANTIZERS, TOKENIZERS
from vfmlab.tokenizers.base import CodePosterior, Tokenizer
from vfmlab.tokenizers.shapes import LayerShape, as_maps, need_vfm, shapes_of


@TOKENIZERS.register("vfmtok")
class VFMTok(Tokenizer):
    """Raw latents are the entries chosen: B channels s s, `tokens` = s x s in raster order.

    With a random encoder the VFM's maps, given or not, are only the feature loss's: the encoder's own are
    computed from the images at each call, so they are not among those that train.vfm_cache stores.

    Args:
        config: see `Config`; the defaults are the paper's. size: side of the images in pixels. vfm: the
        frozen VisionModel of the run; its layers are the levels, the last is what the feature branch
        rebuilds.
        shapes: layer -> its width and side, in place of a VFM, for imported weights: features are then given
        to :meth:`encode_features`, or a VFM is attached later.

    Raises:
        ConfigError: neither `vfm` nor `shapes`; a random encoder without `vfm`.
        CheckpointError: loaded weights were trained on another random encoder than the one drawn here.
    """

    last = "quant.weight"

    class Config(config.TokenizerConfig):
        quantised: ClassVar = True

        method: Literal["vfmtok"] = "vfmtok"
        channels: int = Field(12, ge=1, description="width of an entry")
        factor: int = Field(16, ge=1, description="pixels of a side for one place of the decoder's grid")
        tokens: int = Field(256, ge=1, description="region tokens, a square number")
        width: int = Field(512, ge=4, description="of both transformers")
        depth: int = Field(6, ge=1, description="encoder layers")
        heads: int = Field(8, ge=1, description="of the encoder's attention")
        points: int = Field(4, ge=1, description="places of each level that a head looks at")
        hidden: int = Field(1024, ge=1, description="of the encoder's feed-forward")
        levels: tuple[int, ...] | None = Field(None, min_length=1, description="those of vfm.layers that the "
                                               "encoder reads; null: all")
        encoder: Literal["random"] | None = Field(None, description="'random': it reads a VFM of random "
                                                  "weights; null: the run's VFM")
        attends: Attends = Field("deformable", description="'cross': plain attention on all places")
        decoder_depth: int = Field(6, ge=1)
        decoder_heads: int = Field(8, ge=1)
        decoder_hidden: int = Field(1368, ge=1, description="of the decoder's gated feed-forward")
        registers: int = Field(4, ge=0)
        registers_first: bool = Field(True, description="before the grid; as released they come last, "
                                                        "where a causal transformer cannot use them")
        shared: bool = Field(True, description="one transformer for pixels and features")
        masks: bool = Field(False, description="one mask token for both, as the paper's text has it; the "
                                               "release has two")
        pixel_width: int = Field(128, ge=1, description="convolutions: channels at the finest resolution")
        pixel_multipliers: tuple[int, ...] | None = Field(None, description="widths over pixel_width, finest "
                                                                              "first")
        pixel_blocks: int = Field(2, ge=1, description="residual blocks per resolution")
        quantizer: config.AnyQuantizer = Field(default_factory=lambda: QUANTIZERS.get("cosine").Config())

        @model_validator(mode="after")
        def _fits(self) -> VFMTok.Config:
            if math.isqrt(self.tokens) ** 2 != self.tokens:
                near = round(math.sqrt(self.tokens)) ** 2
                raise ValueError(f"tokens {self.tokens}: queries lie on a square grid; use {near}")
            if self.width % self.heads or self.width % self.decoder_heads:
                raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of "
                                 f"decoder_heads {self.decoder_heads}")
            return self

        def map_shape(self, size: int) -> tuple[int, int, int]:
            side = math.isqrt(self.tokens)
            return self.channels, side, side

    def __init__(self, config: VFMTok.Config, size: int, vfm: nn.Module | None = None,
                 shapes: dict[int, LayerShape] | None = None):
        super().__init__(config, size, vfm)
        if shapes is None or config.encoder is not None:
            need_vfm(vfm, config.method, "encodes with a vision foundation model")
            shapes = shapes or shapes_of(vfm, vfm.layers)
        c, self.layers, self.shapes = config, tuple(shapes), shapes
        self.levels, self.rebuilt = c.levels or self.layers, self.layers[-1]
        target = shapes[self.rebuilt]
        if not set(self.levels) <= set(self.layers):
            raise ConfigError(f"tokenizer.levels {list(self.levels)} must be of vfm.layers "
                              f"{list(self.layers)}; put them there, the target of the feature loss last")
        if c.encoder == "random":
            self.frozen["random"] = own = vfm.random_copy()
            self.layers = (self.rebuilt,)  # all that is asked of the run's VFM
            # saved, so that weights never meet another random encoder than theirs
            drawn = torch.tensor(list(bytes.fromhex(own.fingerprint)), dtype=torch.uint8)
            self.register_buffer("encoder_fingerprint", drawn)
        self.encoder = RegionEncoder([shapes[level].width for level in self.levels], c.tokens, c.width,
                                     c.depth, c.heads, c.points, c.hidden, c.attends)
        self.quant = nn.Linear(c.width, c.channels)
        self.quantizer = QUANTIZERS.get(c.quantizer.kind)(c.quantizer, c.channels)
        self.post_quant = nn.Linear(c.channels, c.width)
        self.decoder = RegionDecoder(
            c.tokens, c.width, c.decoder_depth, c.decoder_heads, c.decoder_hidden, size // c.factor,
            target.side, target.width, c.registers, c.registers_first, c.shared, c.masks,
        )  # fmt: skip
        widths = levels(c.pixel_width, c.pixel_multipliers, c.factor, "tokenizer.pixel")
        self.pixels = ConvUpsampler(c.width, c.factor, size, widths, c.pixel_blocks, ())

    # -- encoder --------------------------------------------------------------------------------------------

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> CodePosterior:
        if images.shape[-2:] != (self.size, self.size):  # whatever it reads, it decodes to these
            height, width = images.shape[-2:]
            raise ConfigError(f"tokenizer 'vfmtok' reads images of {self.size} x {self.size} px, not of "
                              f"{height} x {width}; resize or crop them, and set equivariance.p_prior=0, "
                              "which scales them")
        if self.config.encoder == "random":
            return self._encode(self.frozen["random"].features(images, self.levels).maps)
        return self._encode(self.read_features(images, features, self.levels))

    def encode_features(self, features: Sequence[Tensor]) -> CodePosterior:
        """Tokens (B N D) of vfm.layers, in their order, of the VFM that the encoder reads -> `indices` B T,
        `latents` B T channels."""
        return self._encode(as_maps(features, tuple(self.shapes), self.shapes))

    def _encode(self, maps: dict[int, Tensor]) -> CodePosterior:
        tokens = self.quant(self.encoder([maps[level] for level in self.levels]))
        return CodePosterior.of(self.quantizer, tokens.transpose(1, 2).unflatten(2, self.map_shape[1:]))

    # -- decoder --------------------------------------------------------------------------------------------

    def memory(self, z: Tensor) -> Tensor:
        """Raw latents (B channels s s) -> what the decoder sees of them, B T width."""
        if z.shape[-2:] != self.map_shape[1:]:
            raise ConfigError(f"tokenizer 'vfmtok' decodes a grid of {self.map_shape[1:]} tokens, not of "
                              f"{tuple(z.shape[-2:])}; set equivariance.p_latent=0, which scales it")
        return self.post_quant(z.flatten(2).transpose(1, 2))

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        return [self.pixels(self.decoder.pixels(self.memory(z)))]

    def rebuild(self, z: Tensor) -> dict[int, Tensor]:
        return {self.rebuilt: self.decoder.features(self.memory(z))[1]}

    def class_token(self, z: Tensor) -> Tensor:
        """Raw latents (B channels s s) -> class token of the feature branch, B width; the paper probes it."""
        return self.decoder.features(self.memory(z))[0]

    def last_decoder_layer(self) -> nn.Parameter:
        return self.pixels.conv_out.weight

    # -- weights --------------------------------------------------------------------------------------------

    def adapt(self, tensors: Mapping[str, Tensor]) -> None:
        super().adapt(tensors)
        theirs = tensors.get("encoder_fingerprint")
        if self.config.encoder == "random" and theirs is not None and not torch.equal(
                theirs.cpu(), self.encoder_fingerprint.cpu()):
            raise CheckpointError("tokenizer.encoder 'random': the weights were trained on another random "
                                  "encoder than this torch and timm draw; use the versions of their run, or "
                                  "train again")
