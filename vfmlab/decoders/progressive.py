"""VFM-VAE's decoder: one latent fused into several blocks, an image at every resolution (arXiv 2510.18457).

    z -> decompress -> z' --pool--> mapping -> w (one global style for all layers)
                        |--fusion-> block 0 -> block 1 -> ... -> block n-1   each block doubles the side
                                       |          |                 |
                                    running sum s = upsample(s) + x; ToRGB(s) is its image

Every part of it is a switch of one config, so that the paper's ablation is a change of fields, not of code:

| row of its decoder table    | fields                                                                            |
|-----------------------------|-----------------------------------------------------------------------------------|
| plain decoder               | fusion, style, attention, running_sum, multiscale, blur: false; layer: conv;      |
|                             | upsample: nearest                                                                 |
| + multi-scale latent fusion | the same with fusion: true                                                        |
| + modern blocks             | the defaults                                                                      |

(The paper does not say which parts its rows switch together beyond their names; this grouping is ours.)

Names: the release's `num_blocks` is `blocks`, `concat_z_block_indices` / `concat_z_mapped_dims` are
`fusion_blocks` / `fusion_widths`, `attn_block_indices` / `attn_depths` are `attention_blocks` /
`attention_depths`, `z_dim_for_mapping_mlp_output` is `style_width`, `z_pooled_resolution` is `style_pool`,
`use_gaussian_blur` is `blur`. The tuples `res_layers`, `kernels` and `taps` are indexed by block, and their
last entry holds for all further blocks.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.attention_projection import Gelu, Kind, projection
from vfmlab.nn.convnext import Activation, ModulatedConvNeXt, ModulatedResBlock
from vfmlab.nn.fusion import LatentFusion
from vfmlab.nn.modulation import Mapping, ToRGB
from vfmlab.nn.null_attention import AttentionBlock
from vfmlab.nn.resample import NearestUpsample, ShuffleUpsample
from vfmlab.registry import DECODERS


class ProgressiveConfig(config.DecoderConfig):
    """Options of :class:`ProgressiveDecoder`; the defaults are the paper's at 256 px (128,144,914
    parameters)."""

    kind: Literal["progressive"] = "progressive"

    decompress: Kind = Field("attention",
                             description="how z is widened: attention projection or 1x1 convolution")
    decompress_factor: int = Field(16, ge=1, description="channels of z' over channels of z, so more latent "
                                   "channels make a larger decoder; the variants +d4 to +d128 keep z'")
    decompress_layers: int = Field(1, ge=1, description="attention projections in a row")
    gelu: Gelu = Field("tanh", description="GELU of the attention projection; 'erf' is faster on the CPU")

    blocks: int = Field(6, ge=1, description="resolutions size / 2^(blocks - 1) ... size")
    channel_base: int = Field(32768, ge=1,
                              description="width = channel_base / (px * 256 / size), at most channel_max")
    channel_max: int = Field(512, ge=1)
    num_res_blocks: int = Field(2, ge=0, description="layers per block = 1 + num_res_blocks * res_layers")
    res_layers: tuple[int, ...] = Field((3, 3, 3, 3, 2), min_length=1)
    layer: Literal["convnext", "conv"] = Field("convnext",
                                               description="'conv': 3x3 residual blocks, the ablation")
    kernels: tuple[int, ...] = Field((5, 5, 7), min_length=1,
                                     description="of the depthwise convolutions (odd)")
    expansion: int = Field(4, ge=1, description="hidden width of a ConvNeXt layer over its channels")
    activation: Activation = "gelu"
    layer_scale: float = 1e-5
    upsample: Literal["shuffle", "nearest"] = "shuffle"
    blur: bool = Field(True, description="fixed binomial blur after every up-sampling")
    taps: tuple[int, ...] = Field((3, 3, 3, 5), min_length=1, description="taps of the blur (odd)")
    running_sum: bool = Field(True,
                              description="images are read from the sum of the blocks; off: from each alone")
    multiscale: bool = Field(True, description="an image from every block; off: from the last alone")

    fusion: bool = Field(True, description="off: z' enters block 0 only")
    fusion_blocks: tuple[int, ...] = (0, 1, 2, 3)
    fusion_widths: tuple[int, ...] = (512, 256, 128, 128)
    fusion_activation: Activation = "leaky_relu"

    style: bool = Field(True, description="off: no mapping network and no modulation")
    style_width: int = Field(512, ge=1)
    style_hidden: int | None = Field(None, ge=1,
                                     description="between the mapping network's layers; none: style_width")
    style_pool: int = Field(1, ge=1,
                            description="z' is pooled to so many pixels squared for the mapping network")

    attention: bool = Field(True, description="self-attention and feed-forward after the layers of "
                                              "`attention_blocks`")
    attention_blocks: tuple[int, ...] = (0, 1, 2)
    attention_depths: tuple[int, ...] = (2, 2, 2)
    heads: int = Field(8, ge=1)
    cross_attention: bool = Field(False,
                                  description="in `attention_blocks`, to the tokens of z' or a given context")
    context_width: int | None = Field(None, ge=1, description="width of a given context; None: that of z'")

    legacy_noise: bool = Field(False,
                               description="noise of the released 256 px weights; not for new training")

    @model_validator(mode="after")
    def _fits(self) -> ProgressiveConfig:
        for name, indices, values in (
            ("fusion", self.fusion_blocks, self.fusion_widths),
            ("attention", self.attention_blocks, self.attention_depths),
        ):
            if len(indices) != len(values) or len(set(indices)) < len(indices):
                raise ValueError(f"{name}_blocks {list(indices)} with the values {list(values)}: name each "
                                 "block once and give one value for each")
            if any(not 0 <= i < self.blocks for i in indices) and getattr(self, name):
                raise ValueError(f"{name}_blocks {list(indices)}: the blocks are 0 to {self.blocks - 1}")
        if 0 not in self.fusion_blocks:
            raise ValueError(f"fusion_blocks {list(self.fusion_blocks)}: block 0 has no input but z, add 0")
        for name in ("kernels", "taps"):
            if any(k < 1 or k % 2 == 0 for k in getattr(self, name)):
                raise ValueError(f"{name} {list(getattr(self, name))}: odd numbers are needed")
        if any(n < 0 for n in self.res_layers):
            raise ValueError(f"res_layers {list(self.res_layers)}: numbers of layers cannot be negative")
        return self


def _at(values: tuple[int, ...], block: int) -> int:
    return values[min(block, len(values) - 1)]


class Block(nn.Module):
    """Up-sample by two, modulated layers, attention, running sum, ToRGB.

    Args:
        index: of the block. inputs: channels of the previous block's features and of the fused latent,
        together.
        previous: channels of the previous block's running sum; 0: first block. outputs: channels of this
        block.
        context: width of the tokens for cross-attention.
    """

    def __init__(self, c: ProgressiveConfig, index: int, inputs: int, previous: int, outputs: int,
                 context: int):
        super().__init__()
        style = c.style_width if c.style else 0
        taps = _at(c.taps, index) if c.blur else 0
        if c.upsample == "shuffle":
            self.upsample = ShuffleUpsample(inputs, outputs, taps, norm_after=index == 0)
            sum_upsample = ShuffleUpsample(previous, outputs, taps) if previous else None
        else:
            self.upsample = NearestUpsample(inputs, outputs, taps)
            sum_upsample = NearestUpsample(previous, outputs, taps) if previous else None
        self.sum_upsample = sum_upsample if c.running_sum else None
        depth = 1 + c.num_res_blocks * _at(c.res_layers, index)
        if c.layer == "convnext":
            noise = 8 * 2**index if c.legacy_noise else 0
            self.layers = nn.ModuleList(
                ModulatedConvNeXt(outputs, style, _at(c.kernels, index), c.expansion, c.layer_scale,
                                  c.activation, noise)
                for _ in range(depth)
            )
        else:
            self.layers = nn.ModuleList(ModulatedResBlock(outputs, style) for _ in range(depth))
        depth = dict(zip(c.attention_blocks, c.attention_depths, strict=True)).get(index, 0)
        selfs, crosses = depth if c.attention else 0, depth if c.cross_attention else 0
        self.attention = nn.ModuleList(AttentionBlock(outputs, c.heads) for _ in range(selfs))
        self.cross_attention = nn.ModuleList(AttentionBlock(outputs, c.heads, context)
                                             for _ in range(crosses))
        last = index == c.blocks - 1
        self.to_rgb = ToRGB(outputs, style) if c.multiscale or last else None

    def forward(self, x: Tensor, total: Tensor | None, w: Tensor | None, context: Tensor | None,
                mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """x: B C h w, total: running sum -> features B C' 2h 2w, running sum, image B 3 2h 2w or None."""
        x = self.upsample(x)
        for layer in self.layers:
            x = layer(x, w)
        for attend, look in zip_longest(self.attention, self.cross_attention):
            x = x if attend is None else attend(x)
            x = x if look is None else look(x, context, mask)
        total = x if total is None or self.sum_upsample is None else self.sum_upsample(total) + x
        return x, total, None if self.to_rgb is None else self.to_rgb(total, w)


@DECODERS.register("progressive")
class ProgressiveDecoder(nn.Module):
    """Raw latents B C h w -> [image B 3 H W, images of the lower blocks, largest first]; fp32, unbounded
    range.

    Other latent sizes than `latent_side` give images of other sizes in proportion (equivariance training
    needs that); they must be multiples of `latent_multiple`.

    Args:
        config: see :class:`ProgressiveConfig`. latent_channels, latent_side: of z. size: side of the images
        in pixels.

    Raises:
        ConfigError: the blocks' resolutions, the image size and the latent side do not fit.
    """

    Config = ProgressiveConfig

    def __init__(self, config: ProgressiveConfig, latent_channels: int, latent_side: int, size: int):
        super().__init__()
        self.config, c = config, config
        if size % 2**c.blocks:
            raise ConfigError(f"decoder.blocks {c.blocks}: images of {size} px cannot be halved {c.blocks} "
                              f"times; use fewer blocks or a data.size that is a multiple of {2**c.blocks}")
        resolutions = [size // 2 ** (c.blocks - 1 - i) for i in range(c.blocks)]
        channels = [max(1, min(c.channel_base * size // (px * 256), c.channel_max)) for px in resolutions]
        inner = latent_channels * c.decompress_factor
        self.decompress = projection(c.decompress, latent_channels, inner, c.decompress_layers, c.gelu)
        self.mapping = Mapping(inner, c.style_width, c.style_pool, hidden=c.style_hidden) if c.style else None

        fused = dict(zip(c.fusion_blocks, c.fusion_widths, strict=True))
        if not c.fusion:
            fused = {0: fused[0]}
        self.fusion = nn.ModuleDict()
        for index, width in sorted(fused.items()):
            up, down = self._ratio(resolutions[index] // 2, latent_side, index)
            self.fusion[str(index)] = LatentFusion(inner, width, up, down, c.fusion_activation)
        self.last = f"blocks.{c.blocks - 1}.to_rgb.weight"
        self.latent_multiple = max(fusion.down for fusion in self.fusion.values())

        self.blocks = nn.ModuleList()
        for index, width in enumerate(channels):
            previous = channels[index - 1] if index else 0
            inputs = previous + fused.get(index, 0)
            self.blocks.append(Block(c, index, inputs, previous, width, c.context_width or inner))

    @staticmethod
    def _ratio(target: int, side: int, index: int) -> tuple[int, int]:
        up, down = max(1, target // side), max(1, side // target)
        if target * down != side * up:
            raise ConfigError(f"decoder.blocks: block {index} takes the latent at {target} px, no multiple "
                              f"or divisor of its {side} px; choose decoder.blocks, data.size and "
                              "tokenizer.factor so that they differ by whole factors")
        return up, down

    def forward(self, z: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """z: B C h w. For cross-attention, context: B M context_width (default: of z'), mask: bool B M."""
        if z.shape[-1] % self.latent_multiple or z.shape[-2] % self.latent_multiple:
            raise ConfigError(f"latents of {z.shape[-2]} x {z.shape[-1]} do not divide by "
                              f"{self.latent_multiple} (latent fusion); leave out that scale "
                              "(equivariance.scales) or use fewer decoder.blocks")
        z = self.decompress(z).contiguous(memory_format=torch.channels_last)
        w = None if self.mapping is None else self.mapping(z)
        if self.config.cross_attention and context is None:
            context = z.flatten(2).transpose(1, 2)
            if context.shape[-1] != (self.config.context_width or context.shape[-1]):
                raise ConfigError(f"decoder.context_width {self.config.context_width}: this decoder attends "
                                  "to a context of its own; call it with one, or set the width to that of "
                                  f"z', {context.shape[-1]}")
        x = total = None
        images = []
        for index, block in enumerate(self.blocks):
            parts = [] if x is None else [x]
            if str(index) in self.fusion:
                parts.append(self.fusion[str(index)](z))
            x, total, image = block(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], total, w,
                                    context, mask)
            if image is not None:
                images.append(image)
        return images[::-1]
