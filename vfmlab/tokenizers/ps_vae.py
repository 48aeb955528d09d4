"""PS-VAE (arXiv 2512.17909): a feature autoencoder makes a compact latent of a VFM's tokens; then pixels, and
the VFM itself, learn through it.

    images -> trainable copy of the VFM -> blocks, linear -> mean, log-variance -> z
    z -> linear, blocks -> rebuilt tokens;   z -> any decoder -> images

Stage one trains the feature autoencoder on the VFM's tokens (losses `feature_reconstruction` with l2 and
cosine, `kl`) and the pixel decoder on latents that pixels do not shape. Stage two trains everything: rebuilt
tokens stay near to those of the *original* VFM, and pixels reach the encoder. Which of the two it is follows
from what trains: as long as the copy of the VFM is frozen, the pixel decoder sees detached latents. No code
was published. Ours: the blocks start from scratch, not from the VFM's, and one linear layer leads to the
latent and one back, in the place of the paper's perceptrons, whose widths it does not give.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.vit_block import ViTBlock
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.shapes import width_on_grid


class Blocks(nn.Module):
    """Transformer blocks on B N D, as wide as the VFM."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(ViTBlock(width, heads, 4 * width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@TOKENIZERS.register("ps_vae")
class PSVAE(Tokenizer):
    """KL latent on the VFM's grid, with a feature decoder; any decoder for pixels.

    Raises:
        ConfigError: no VFM, or a latent on another grid; heads that do not divide the VFM's width.
    """

    copied = "backbone"
    last = "moments.weight"

    class Config(config.TokenizerConfig):
        method: Literal["ps_vae"] = "ps_vae"
        channels: int = Field(96, ge=1, description="latent channels")
        factor: int = Field(16, ge=1, description="spatial down-sampling; must give the VFM's grid")
        layer: int = Field(-1, description="VFM layer that is encoded and rebuilt")
        depth: int = Field(3, ge=1, description="blocks of feature encoder and of feature decoder, each")
        heads: int = Field(12, ge=1)
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("conv").Config())

    def __init__(self, config: PSVAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        width = width_on_grid(vfm, config, size, "encodes a vision foundation model's tokens")
        channels, side, _ = self.map_shape
        if width % config.heads:
            raise ConfigError(f"tokenizer.heads {config.heads}: the VFM's width {width} is no multiple of "
                              "it; choose another number")
        self.teacher_layers = (config.layer,)  # the original, which `feature_reconstruction` compares with
        self.backbone = vfm.trainable_copy((config.layer,))
        self.encoder, self.moments = Blocks(width, config.depth, config.heads), nn.Linear(width, 2 * channels)
        self.widen = nn.Linear(channels, width)
        self.feature_decoder = Blocks(width, config.depth, config.heads)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)

    @property
    def tuned(self) -> bool:
        """Whether the copy of the VFM trains."""
        return any(parameter.requires_grad for parameter in self.backbone.parameters())

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        maps = self.read_features(images, features, (self.config.layer,))[self.config.layer]
        x = self.encoder(maps.flatten(2).transpose(1, 2))
        moments = self.moments(x).transpose(1, 2).unflatten(2, maps.shape[-2:]).float()
        mean, logvar = moments.chunk(2, dim=1)
        return self.gaussian(mean, logvar)

    def rebuild(self, z: Tensor) -> dict[int, Tensor]:
        x = self.feature_decoder(self.widen(z.flatten(2).transpose(1, 2)))
        return {self.config.layer: x.transpose(1, 2).unflatten(2, z.shape[-2:]).float()}

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        return self.decoder(z if self.tuned else z.detach())
