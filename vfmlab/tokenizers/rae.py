"""RAE: the tokens of a frozen vision foundation model are the latent, nothing is compressed (arXiv
2510.11690); and RAEv2.

    VFM blocks -> layer norm without weights, each -> mean -> standardise per channel -> z (+ noise in
    training) -> decoder

Only the decoder is trained, and with `fusion` HiRAE's experts and router. `rae` reads the last block alone.
`multi_layer_rae` (RAEv2, arXiv 2605.18324) reads the last K blocks, or every `stride`-th of them; their sum
and their mean are the same latent once it is standardised. What the paper's release does and this does: the
final norm without its weights on every block, DINOv3 with the last block's mean over places added everywhere.
Reading block outputs through a layer norm of our own (and not the model's final one) is the same thing, since
its weights are left out. Statistics are one mean and std for each channel, with `places` for each channel and
place as in the release, fixed before training.

Noise: z + sigma * n with n ~ N(0, 1), one sigma for each image, |N(0, tau)| as the paper writes; the release
draws it uniformly from [0, tau] (`noise_law`) and adds it before standardisation (`noise_on`).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.layer_fusion import BoundedFusion, FusionConfig
from vfmlab.nn.standardise import Standardise, over
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.linear_start import LinearWrite
from vfmlab.tokenizers.shapes import check_grid, check_whole, need_vfm

EPS = 1e-6  # of the layer norm, as in the large models


@TOKENIZERS.register("rae")
class RAE(Tokenizer):
    """Deterministic latent (no variance) of as many channels as the VFM is wide, on the VFM's own grid; any
    decoder.

    Raises:
        ConfigError: no VFM; `channels` or the latent's side are not the VFM's.
    """

    class Config(config.TokenizerConfig):
        method: Literal["rae"] = "rae"
        channels: int = Field(768, ge=1, description="must be the VFM's width")
        factor: int = Field(16, ge=1, description="spatial down-sampling; must give the VFM's grid")
        last: int = Field(1, ge=1, description="K: how many blocks are read, counted from the last")
        stride: int = Field(1, ge=1,
                            description="every so many blocks (the release's K = 7 is every second one)")
        pooled: bool = Field(False, description="add the last block's mean over places everywhere, as the "
                                                "release does for DINOv3")
        noise: float = Field(0.8, ge=0, description="tau: scale of the training noise on the standardised "
                                                    "latent; 0: none")
        noise_law: Literal["half_normal", "uniform"] = Field("half_normal", description="sigma ~ |N(0, "
            "tau)|, or uniform in [0, tau]")
        linear_start: bool = Field(False, description="add a linear path to the decoder, fitted before "
                                                      "training (linear_start.py)")
        noise_on: Literal["raw"] | None = Field(None, description="raw: noise before standardisation, as the "
                                                                  "release has it; null: after it")
        fusion: FusionConfig | None = Field(None, description="HiRAE's bounded fusion of the layers read, in "
            "place of their mean; it trains with the decoder")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("vit").Config())

        @model_validator(mode="after")
        def _one_space(self) -> RAE.Config:
            if self.linear_start and self.noise_on == "raw":
                raise ValueError("linear_start is fitted for noise on the standardised latent; set "
                                 "noise_on=null or linear_start=false")
            return self

    def __init__(self, config: RAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        need_vfm(vfm, config.method, "encodes with a vision foundation model")
        self.layers = last_blocks(vfm.depth, config.last, config.stride)
        channels, side, _ = self.latent_shape
        for layer in self.layers:
            check_grid(vfm, layer, side, config.factor)
            check_whole(vfm.width(layer), config, layer)
        if config.fusion is not None and (len(self.layers) < 3 or config.pooled):
            raise ConfigError(f"tokenizer.fusion joins three groups of layers without a pooled token, here "
                              f"tokenizer.last is {config.last} and pooled {config.pooled}; set "
                              "tokenizer.last to 3 or more and pooled=false, or fusion=null")
        self.fusion = (
            None if config.fusion is None else BoundedFusion(channels, len(self.layers), config.fusion)
        )
        self.standardise = Standardise(channels, (side, side) if config.places else None)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)
        self.write = LinearWrite(channels, config.factor) if config.linear_start else None

    # -- encoder --------------------------------------------------------------------------------------------

    def tokens(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Tensor:
        """Images (B 3 H W) -> the VFM's normalised tokens before standardisation (B C h w)."""
        maps = self.read_features(images, features, self.layers)
        if self.fusion is not None:
            return plain_norm(self.fusion([maps[layer] for layer in self.layers]))
        return self.fuse([plain_norm(maps[layer]) for layer in self.layers], self.config.pooled)

    @staticmethod
    def fuse(blocks: list[Tensor], pooled: bool) -> Tensor:
        """The mean of blocks' maps (B C h w each), with the deepest's, the last's, mean over places if
        `pooled`."""
        mean = sum(blocks) / len(blocks)
        return mean + blocks[-1].mean(dim=(2, 3), keepdim=True) if pooled else mean

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        return Posterior(self.standardise(self.tokens(images, features)))

    def begin(self, batches: list[Tensor]) -> str:
        """Measures the latent's statistics, then fits the linear start where there is one."""
        batches = [images.to(self.stat_mean.device) for images in batches]
        self.standardise.fit(self.tokens(images) for images in batches)
        if self.write is not None:
            tau = self.config.noise
            variance = tau**2 if self.config.noise_law == "half_normal" else tau**2 / 3
            self.write.solve(((images, self.posterior(images).mean) for images in batches), variance)
        return "" if self.write is None else "the decoder starts from a linear map solved in closed form"

    def perturb(self, z: Tensor, rng: StepRandom) -> Tensor:
        draw = rng.randn(1, 1, 1).abs() if self.config.noise_law == "half_normal" else rng.rand(1, 1, 1)
        noise = self.config.noise * draw * rng.randn(*z.shape[1:])
        return z + (noise if self.config.noise_on is None else noise / over(self.standardise.std, z))

    def last_encoder_layer(self) -> nn.Parameter:
        if self.fusion is not None:
            return self.fusion.experts[-1].contract.weight
        raise ConfigError(f"tokenizer '{self.config.method}' trains no encoder: no adaptive weight can be "
                          "taken there; set adaptive=false, or leave the term out")

    # -- decoder --------------------------------------------------------------------------------------------

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        images = self.decoder(z)
        return images if self.write is None else self.write(images, z)


@TOKENIZERS.register("multi_layer_rae")
class MultiLayerRAE(RAE):
    """RAE on the mean of the last K blocks (RAEv2); K = 1 is `rae`. All blocks must be on one grid."""

    class Config(RAE.Config):
        method: Literal["multi_layer_rae"] = "multi_layer_rae"  # type: ignore[assignment]
        last: int = Field(7, ge=1, description="K: how many blocks are read, counted from the last")


def last_blocks(depth: int, last: int, stride: int) -> tuple[int, ...]:
    """The layers to read of a VFM with `depth` blocks, the last one (-2: before the final norm) last."""
    first = depth - (last - 1) * stride
    if first < 1:
        raise ConfigError(f"tokenizer.last {last}: with tokenizer.stride {stride} the VFM's {depth} blocks "
                          f"give at most {(depth - 1) // stride + 1}; lower one of them")
    return (*range(first, depth, stride), -2)


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of B C h w, without weights, in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float().movedim(1, -1), x.shape[1:2], eps=EPS).movedim(-1, 1)
