"""SiT with representation entanglement: a class token of a VFM is denoised beside the latents.

SiT (arXiv 2401.08740) is DiT trained on `vfmlab.diffusion.path`. REG (arXiv 2507.01467) puts the noisy class token of a
frozen VFM in front of the latents' tokens and predicts the velocity of both; REPA (arXiv 2410.06940) reads the tokens
after an early block out to the VFM's patch tokens. It is no entry of the network registry, because it takes and returns
two latents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.diffusion.blocks import Block, FinalLayer, LayerNorm, TimeEmbedding, initialise, unpatchify
from vfmlab.diffusion.dit import Shape, pick, token_grid
from vfmlab.nn.rope import sincos_table


class Prediction(NamedTuple):
    """Velocities of the latents (v: B C h w) and of the class token (v_class: B K), and the tokens after block
    `align_after` read out to each VFM's width (aligned: B (1 + N) K_i, the class token first)."""

    v: Tensor
    v_class: Tensor
    aligned: list[Tensor]


class RegSiT(nn.Module):
    """Velocity network on latents and a class token.

    Args:
        config: see :class:`Config`. latent_shape: (C, h, w). num_classes: also the null label.
    """

    class Config(Shape):
        kind: str = "sit_reg"
        mlp_ratio: float = Field(4.0, gt=0)
        qk_norm: bool = Field(True, description="layer norm of queries and keys, with weights")
        aligned: tuple[int, ...] = Field((768,), description="widths of the VFMs' tokens, the class token's first")
        projector: int = Field(2048, ge=1, description="hidden width of the read-out")
        align_after: int = Field(8, ge=1, description="block after which tokens are read out")

    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        width, depth, heads = config.sizes
        channels, token = latent_shape[0], config.aligned[0]
        self.config, self.latent_shape, self.num_classes = config, tuple(latent_shape), num_classes
        self.grid = token_grid(latent_shape, config.patch)
        self.patch_embed = nn.Conv2d(channels, width, config.patch, config.patch)
        self.class_embed, self.class_norm = nn.Linear(token, width), LayerNorm(width, affine=True)
        self.time_embed = TimeEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        style = (config.mlp_ratio, "layer", config.qk_norm, False, False)
        self.blocks = nn.ModuleList(Block(width, heads, *style) for _ in range(depth))
        self.projectors = nn.ModuleList(_projector(width, config.projector, k) for k in config.aligned)
        self.final = FinalLayer(width, config.patch**2 * channels, "layer")
        self.class_final = nn.Linear(width, token)
        places = torch.cat([torch.zeros(1, width), sincos_table(self.grid, width)])  # the class token has none
        self.pos_embed = nn.Parameter(places[None], requires_grad=False)
        initialise(self)
        nn.init.zeros_(self.class_final.weight)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, cls_token: Tensor, features_at: tuple[int, ...] = ()
    ) -> Prediction | tuple[Prediction, dict[int, Tensor]]:
        """Velocities at noisy latents and class token.

        Args:
            x: B C h w. t: B times in [0, 1], 0 = data. y: B labels. cls_token: B K noisy class token, at the same times.
            features_at: as in :class:`vfmlab.diffusion.dit.LightningDiT`; tokens B (1 + N) D, the class token first.

        Returns:
            :class:`Prediction`; with `features_at`, (Prediction, {k: tokens}).
        """
        token = self.class_norm(self.class_embed(cls_token)).unsqueeze(1)
        h = torch.cat([token, self.patch_embed(x).flatten(2).transpose(1, 2)], dim=1) + self.pos_embed
        c = F.silu(self.time_embed(t) + self.label_embed(y))
        kept, aligned = {0: h}, []
        for k, block in enumerate(self.blocks, 1):
            h = kept[k] = block(h, c)
            if k == self.config.align_after:
                aligned = [project(h) for project in self.projectors]
        h = self.final.modulated(h, c)
        v = unpatchify(self.final.linear(h[:, 1:]), self.config.patch, self.grid)
        out = Prediction(v, self.class_final(h[:, 0]), aligned)
        return out if not features_at else (out, pick(kept, features_at))


def _projector(width: int, hidden: int, out: int) -> nn.Sequential:
    """REPA's three-layer read-out."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
    )
