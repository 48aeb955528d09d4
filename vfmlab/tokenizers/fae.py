"""FAE, the feature auto-encoder: one attention layer squeezes a frozen VFM's map, two decoders lead back
(arXiv 2512.07829).

    VFM map -> one attention layer -> mean, log-variance -> z -> feature decoder -> rebuilt VFM map -> pixel
    decoder -> image

Encoder and feature decoder learn to rebuild the map (loss `feature_reconstruction`, with `kl`); the pixel
decoder learns to paint from what is rebuilt. In the paper pixels never shape the latent: two stages, the
first with trains ("encoder.*", "feature_decoder.*"), the second with trains ("decoder.*"). With all losses in
one stage they do (ours).

From the paper: the sizes of the three parts, which are the defaults; blocks of the feature decoder with
rotary positions, RMS norm and SwiGLU. Ours: maps are standardised per channel before the encoder and behind
the feature decoder (the VFM's own scale is put back in `rebuild`); what the text leaves open of the attention
layer (figure 7) and of the feature decoder's ends, chosen so that both have the paper's 38.17 M and 170.43 M
parameters. The paper first trains the pixel decoder on the VFM's own maps with noise of std 0.4, then on the
rebuilt ones; here it is trained on the rebuilt ones only.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.attention import attend
from vfmlab.nn.rope import rotary_table
from vfmlab.nn.standardise import Standardise
from vfmlab.nn.vit_block import ViTBlock
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.linear_start import LinearStart
from vfmlab.tokenizers.shapes import width_on_grid

VIT_L = {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096}


class OneAttention(nn.Module):
    """The encoder: attention whose heads stay wide and apart, a linear skip beside it, activation, one linear
    map. B N C.

    out(gelu(skip(x) + attention(x))), x behind a layer norm. Values are not projected again after attention:
    the paper merges consecutive linear layers.
    """

    def __init__(self, inputs: int, outputs: int, heads: int, head_width: int):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm = nn.LayerNorm(inputs, eps=1e-6)
        self.qkv, self.skip = nn.Linear(inputs, 3 * inner), nn.Linear(inputs, inner)
        self.out = nn.Linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = self.skip(x) + attend(q, k, v).transpose(1, 2).flatten(2)
        return self.out(F.gelu(y))


class FeatureDecoder(nn.Module):
    """Latent B C h w -> standardised VFM map B D h w: linear, transformer blocks with rotary positions, norm.

    Args:
        inputs: channels of the latent. width: of the VFM. side: of the latent; learned positions are
        interpolated elsewhere.
    """

    def __init__(self, inputs: int, width: int, side: int, depth: int, heads: int, mlp_ratio: float):
        super().__init__()
        hidden = round(width * mlp_ratio * 2 / 3)  # of SwiGLU, which has three matrices for the usual two
        self.embed = nn.Conv2d(inputs, width, 1)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, side, side))
        self.blocks = nn.ModuleList(ViTBlock(width, heads, hidden, norm="rms", gated=True)
                                    for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head_width = width // heads

    def forward(self, z: Tensor) -> Tensor:
        grid, position = z.shape[-2:], self.position
        if position.shape[-2:] != grid:
            position = F.interpolate(position, grid, mode="bicubic", antialias=True, align_corners=False)
        table = rotary_table(tuple(grid), self.head_width).to(z.device)
        x = (self.embed(z) + position).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, table)
        return self.norm(x).transpose(1, 2).unflatten(2, grid)


@TOKENIZERS.register("fae")
class FAE(Tokenizer):
    """KL latent of few channels on the VFM's own grid; a feature decoder, then any registered decoder for
    pixels.

    Raises:
        ConfigError: no VFM; a latent that is not on the grid of the VFM's layer; heads that do not divide the
        widths.
    """

    last = "encoder.out.weight"

    class Config(config.TokenizerConfig):
        method: Literal["fae"] = "fae"
        channels: int = Field(32, ge=1, description="latent channels")
        factor: int = Field(16, ge=1, description="spatial down-sampling; must give the VFM's grid")
        layer: int = Field(-1, description="the VFM layer that is encoded and rebuilt")
        heads: int = Field(24, ge=1, description="of the encoder's attention layer")
        head_width: int = Field(256, ge=1, description="width of each of them")
        feature_depth: int = Field(6, ge=1, description="blocks of the feature decoder, as wide as the VFM")
        feature_heads: int | None = Field(None, ge=1,
                                          description="null: heads of width 64 (of 32 below a width of 256)")
        mlp_ratio: float = Field(4.0, gt=0, description="of the feature decoder")
        decode_from: Literal["features", "latent"] = Field("features", description="what the pixel decoder "
            "sees; 'latent' is an ablation of ours")
        linear_start: bool = Field(False,
                                   description="add linear paths fitted before training; see linear_start.py")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("vit").Config(**VIT_L))

    def __init__(self, config: FAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        width = width_on_grid(vfm, config, size, "encodes a vision foundation model's map")
        self.layers = (config.layer,)
        channels, side, _ = self.latent_shape
        heads = config.feature_heads or max(1, width // (64 if width >= 256 else 32))
        if width % (4 * heads):  # rotary positions turn quarters of a head
            raise ConfigError(f"tokenizer.feature_heads {heads}: the VFM's width {width} must be a multiple "
                              "of 4 x heads; choose another number")
        self.standardise = Standardise(width)
        self.encoder = OneAttention(width, 2 * channels, config.heads, config.head_width)
        self.feature_decoder = FeatureDecoder(channels, width, side, config.feature_depth, heads,
                                              config.mlp_ratio)
        seen = width if config.decode_from == "features" else channels
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, seen, side, size)
        if config.linear_start:
            self.start = LinearStart.for_features(channels, config.factor, size, vfm, self.layers)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        maps = self.read_features(images, features, self.layers)
        x = self.standardise(maps[self.config.layer].float())
        out = self.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:]).float()
        mean, logvar = out.chunk(2, dim=1)
        return self.gaussian(mean, logvar, maps)

    def begin(self, batches: list[Tensor]) -> str:
        """Measures the map's statistics, then fits the linear start where there is one."""
        device = self.stat_mean.device
        self.standardise.fit(self.read_features(images.to(device), None, self.layers)[self.config.layer]
                             for images in batches)
        return super().begin(batches)

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        seen = self.feature_decoder(z) if self.config.decode_from == "features" else z
        return self.with_start(self.decoder(seen), z)

    def rebuild(self, z: Tensor) -> dict[int, Tensor]:
        return {self.config.layer: self.standardise.inverse(self.feature_decoder(z).float())}
