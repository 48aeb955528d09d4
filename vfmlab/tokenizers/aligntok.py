"""AlignTok: a vision foundation model becomes the tokenizer's encoder, and is then tuned (arXiv 2509.25162).

    images -> encoder (a trainable copy of the run's VFM) -> adapter -> latent -> any registered decoder
    (default: `conv`)

The latent is deterministic: there is no KL term. What trains when is said by the run's stages: latent
alignment (adapter and decoder), perceptual alignment (everything, held by the loss `preservation`),
refinement (decoder). The paper's encoder is DINOv2-L/14 at its last layer and its widths are f16d32 and d64;
its adapter is called light and not described, so the one here, a normalisation and a two-layer perceptron at
every position, is ours.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.nn.grids import gathered, ratios, steps
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.linear_start import LinearStart
from vfmlab.tokenizers.shapes import need_vfm


class Adapter(nn.Module):
    """Layer norm, linear, GELU, linear at every position: B D h w -> B C h w."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.hidden = nn.Linear(inputs, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1))
        return self.out(F.gelu(self.hidden(x))).permute(0, 3, 1, 2)


@TOKENIZERS.register("aligntok")
class AlignTok(Tokenizer):
    """Trainable VFM encoder -> adapter -> deterministic latent -> decoder.

    The run's VFM gives the encoder's initial weights; later ones are the tokenizer's own, under `encoder.*`.
    Features of the frozen VFM are therefore never read (`layers` is empty).

    Args:
        config: see `Config`. size: side of the images in pixels. vfm: the frozen VisionModel of the run.

    Raises:
        ConfigError: no VFM; grids of layers that do not fit the latent's.
    """

    copied = "encoder"
    last = "adapter.out.weight"

    class Config(config.TokenizerConfig):
        method: Literal["aligntok"] = "aligntok"
        channels: int = Field(32, ge=1, description="latent channels; the paper: 32 and 64")
        factor: int = Field(16, ge=1, description="spatial down-sampling")
        read: tuple[int, ...] = Field(
            (-1,), min_length=1, description="layers of the encoder; the paper reads the last, more are ours"
        )
        adapter_width: int = Field(256, ge=1, description="hidden channels of the adapter (ours)")
        linear_start: bool = Field(False,
                                   description="add linear paths fitted before training; see linear_start.py")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("conv").Config())

    def __init__(self, config: AlignTok.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        need_vfm(vfm, config.method, "starts from a vision foundation model")
        channels, side, _ = self.latent_shape
        self.encoder = vfm.trainable_copy(config.read)
        grids = {layer: vfm.grid(layer)[0] for layer in self.encoder.layers}
        way = f"vfm.upscale, or tokenizer.factor {config.factor}"
        self.ratios = ratios(grids, side, "tokenizer.read", way)
        inputs = sum(vfm.width(layer) * steps(part) ** 2 for layer, part in self.ratios.items())
        self.adapter = Adapter(inputs, config.adapter_width, channels)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)
        if config.linear_start:
            self.start = LinearStart.for_features(channels, config.factor, size, vfm, self.encoder.layers)
            self.start.logvar.requires_grad_(False)  # a deterministic code has none

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        maps = self.read_features(images, features, self.config.read)
        return self.gaussian(self.adapter(gathered(maps, self.ratios, self.size)).float(), None, maps)
