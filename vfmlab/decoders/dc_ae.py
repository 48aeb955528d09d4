"""The decoder of HAE (arXiv 2601.22904), DC-AE's (2410.10733): residual and linear-attention stages with
shortcuts that need no weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.dc_blocks import HEAD, EfficientViTBlock, ResidualBlock, RMSNorm2d, Upsample, Widen
from vfmlab.registry import DECODERS


@DECODERS.register("dc_ae")
class DCDecoder(nn.Module):
    """Stages from the deepest on, each after the first opened by an up-sampling by two; then norm, ReLU, 3x3.

    `forward(z)`: raw latents B C h w -> [images B 3 h*f w*f], unbounded range. Lists run from the finest
    stage to the deepest. A finest stage of no blocks is left to the output layer, which then up-samples. The
    defaults are HAE's for f16; how many stages there are follows from the latent's side, and must be as long
    as the lists.

    Args:
        config: see `Config`. latent_channels, latent_side: of z. size: side of the images in pixels.
    """

    class Config(config.DecoderConfig):
        kind: Literal["dc_ae"] = "dc_ae"
        widths: tuple[int, ...] = Field((256, 512, 512, 1024, 1024), min_length=2)
        depths: tuple[int, ...] = Field((5, 5, 3, 3, 3), description="blocks of each stage")
        blocks: tuple[Literal["residual", "vit"], ...] = ("residual", "residual", "residual", "vit", "vit")
        upsample: Literal["interpolate", "shuffle"] = "interpolate"
        in_shortcut: bool = Field(True, description="repeat the latent's channels past the first convolution")
        norm: bool = Field(False, description="norms in the linear-attention blocks; the release has none")

        @model_validator(mode="after")
        def _alike(self) -> DCDecoder.Config:
            if not len(self.widths) == len(self.depths) == len(self.blocks):
                raise ValueError(f"widths {list(self.widths)}, depths {list(self.depths)} and blocks "
                                 f"{list(self.blocks)} must have an entry for each stage")
            for width, kind in zip(self.widths, self.blocks, strict=True):
                if kind == "vit" and width % HEAD:
                    raise ValueError(f"widths: a 'vit' stage of {width} is no multiple of {HEAD}, a head's "
                                     "width")
            for fine, deep in zip(self.widths, self.widths[1:], strict=False):
                if 4 * fine % deep:
                    raise ValueError(f"widths: 4 x {fine} is no multiple of the deeper {deep}, which the "
                                     "shortcut of the up-sampling needs")
            return self

    def __init__(self, config: DCDecoder.Config, latent_channels: int, latent_side: int, size: int):
        super().__init__()
        self.config = config
        stages, factor = len(config.widths), size // latent_side
        if latent_side * 2 ** (stages - 1) != size:
            raise ConfigError(f"decoder.widths {list(config.widths)}: {stages} stages decode "
                              f"f{2 ** (stages - 1)}, "
                              f"but the latent is f{factor}; give as many entries as it needs")
        deepest = config.widths[-1]
        if config.in_shortcut and deepest % latent_channels:
            raise ConfigError(f"decoder.in_shortcut: {deepest}, the deepest width, is no multiple of the "
                              f"latent's {latent_channels} channels; set it to false")
        self.project_in = Widen(latent_channels, deepest, config.in_shortcut)
        make = {"residual": ResidualBlock, "vit": lambda width: EfficientViTBlock(width, config.norm)}
        self.stages, width = nn.ModuleList(), deepest
        for i in reversed(range(0 if config.depths[0] else 1, stages)):
            parts = [] if i == stages - 1 else [Upsample(width, config.widths[i], config.upsample)]
            width = config.widths[i]
            self.stages.append(nn.Sequential(*parts, *(make[config.blocks[i]](width)
                                                       for _ in range(config.depths[i]))))
        self.norm_out = RMSNorm2d(width)
        if config.depths[0]:
            self.conv_out: nn.Module = nn.Conv2d(width, 3, 3, padding=1)
        else:
            self.conv_out = Upsample(width, 3, config.upsample, shortcut=False)
        self.last = "conv_out.weight" if config.depths[0] else "conv_out.conv.weight"

    def forward(self, z: Tensor) -> list[Tensor]:
        x = self.project_in(z)
        for stage in self.stages:
            x = stage(x)
        return [self.conv_out(F.relu(self.norm_out(x)))]
