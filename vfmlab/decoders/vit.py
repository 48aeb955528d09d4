"""The decoder of a masked autoencoder (MAE, arXiv 2111.06377): a plain vision transformer from latents to
patches of pixels.

RAE (arXiv 2510.11690) decodes with it; the defaults are its ViT-XL. How the fields map to the release's
argument names, in brackets: `width` [decoder_hidden_size], `depth` [decoder_num_hidden_layers], `heads`
[decoder_num_attention_heads], `hidden` [decoder_intermediate_size], `eps` [layer_norm_eps], `activation`
[hidden_act]; `patch_size` and `image_size` follow from the sizes of image and latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.rope import positions, sincos_table
from vfmlab.nn.vit_block import Activation, ViTBlock
from vfmlab.registry import DECODERS


@DECODERS.register("vit")
class ViTDecoder(nn.Module):
    """Linear -> class token, fixed sine-cosine positions -> transformer blocks -> norm -> linear to the
    pixels of each patch.

    `forward(z)`: raw latents B C h w -> [images B 3 h*f w*f], unbounded range. Other grids than the trained
    one get its position code interpolated.

    Args:
        config: see `Config`. latent_channels, latent_side: of z. size: side of the images in pixels. pixels:
            channels of the images (other numbers than 3 only in imported weights).
    """

    last = "pred.weight"

    class Config(config.DecoderConfig):
        kind: Literal["vit"] = "vit"
        width: int = Field(1152, ge=4, description="of the tokens; a multiple of 4 and of `heads`")
        depth: int = Field(28, ge=1, description="transformer blocks")
        heads: int = Field(16, ge=1)
        hidden: int = Field(4096, ge=1, description="width of the feed-forward layers")
        activation: Activation = "gelu"
        eps: float = Field(1e-12, gt=0, description="of the layer norms")
        qkv_bias: bool = True
        class_token: bool = Field(True,
                                  description="a trained token beside the patches, dropped before the pixels")

        @model_validator(mode="after")
        def _fits(self) -> ViTDecoder.Config:
            if self.width % 4 or self.width % self.heads:
                raise ValueError(f"width {self.width} must be a multiple of 4 and of heads {self.heads}")
            return self

    def __init__(self, config: ViTDecoder.Config, latent_channels: int, latent_side: int, size: int,
                 pixels: int = 3):
        super().__init__()
        if size % latent_side:
            raise ConfigError(f"decoder.kind vit: {size} px from a {latent_side} px latent is no whole "
                              "patch; choose data.size and tokenizer.factor accordingly")
        self.config, self.side, self.patch, width = config, latent_side, size // latent_side, config.width
        self.embed = nn.Linear(latent_channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        table = sincos_table((latent_side, latent_side), width)
        # 1 1+N C; the class token's is zero
        self.register_buffer("position", F.pad(table, (0, 0, 1, 0))[None])
        self.blocks = nn.ModuleList(
            ViTBlock(width, config.heads, config.hidden, config.activation, config.eps, config.qkv_bias)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.eps)
        self.pred = nn.Linear(width, self.patch**2 * pixels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # as MAE's
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def logits(self, z: Tensor) -> Tensor:
        """Raw latents B C h w -> values of every patch B (h w) (p p 3): rows, columns, colours."""
        h, w = z.shape[-2:]
        x = self.embed(z.flatten(2).transpose(1, 2))
        position = positions(self.position.to(x.dtype), (h, w), prefix=1)
        x = x + position[:, 1:]
        if self.class_token is not None:
            x = torch.cat([(self.class_token + position[:, :1]).to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x))
        return x if self.class_token is None else x[:, 1:]

    def forward(self, z: Tensor) -> list[Tensor]:
        p = self.patch
        return [rearrange(self.logits(z), "b (h w) (p q c) -> b c (h p) (w q)", h=z.shape[-2], p=p, q=p)]
