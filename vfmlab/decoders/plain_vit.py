"""GAE's decoder (arXiv 2603.10365): a transformer whose norms have no weights, latents to pixels."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.plain_vit import PlainBlock, rms
from vfmlab.nn.rope import positions
from vfmlab.registry import DECODERS


@DECODERS.register("plain_vit")
class PlainViTDecoder(nn.Module):
    """Linear -> learned positions -> blocks -> norm -> linear to the pixels of each patch (row, column,
    colour).

    `forward(z)`: raw latents B C h w -> [images B 3 h*f w*f], unbounded range. The defaults are the
    release's.

    Args:
        config: see `Config`. latent_channels, latent_side: of z. size: side of the images in pixels.
    """

    last = "linear_out.weight"

    class Config(config.DecoderConfig):
        kind: Literal["plain_vit"] = "plain_vit"
        width: int = Field(1024, ge=4, description="of the tokens; a multiple of `heads`")
        depth: int = Field(24, ge=1)
        heads: int = Field(16, ge=1)

        @model_validator(mode="after")
        def _fits(self) -> PlainViTDecoder.Config:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
            return self

    def __init__(self, config: PlainViTDecoder.Config, latent_channels: int, latent_side: int, size: int):
        super().__init__()
        if size % latent_side:
            raise ConfigError(f"decoder.kind plain_vit: {size} px from a {latent_side} px latent is no whole "
                              "patch; choose data.size and tokenizer.factor accordingly")
        self.patch = size // latent_side
        self.z_proj = nn.Linear(latent_channels, config.width, bias=False)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, latent_side**2, config.width))
        self.blocks = nn.ModuleList(PlainBlock(config.width, config.heads) for _ in range(config.depth))
        self.linear_out = nn.Linear(config.width, 3 * self.patch**2, bias=False)

    def forward(self, z: Tensor) -> list[Tensor]:
        h, w = z.shape[-2:]
        x = self.z_proj(z.flatten(2).transpose(1, 2)) + positions(self.pos_embed, (h, w))
        for block in self.blocks:
            x = block(x)
        x = self.linear_out(rms(x))
        return [rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=self.patch, q=self.patch)]
