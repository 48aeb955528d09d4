"""DiT with a decoupled head (DDT, arXiv 2504.05741), in the form of RAE's DiT-DH (arXiv 2510.11690, section
5).

A deep encoder of ordinary width reads the noisy latents and gives one condition per token; a shallow head,
which may be much wider (RAE latents have 768 channels), reads the noisy latents again and predicts the
velocity under that condition. The two are methods of their own, `encode` and `head`, so that one encoding can
serve several steps of the head.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.diffusion.blocks import Block, FinalLayer, FourierEmbedding, initialise, unpatchify
from vfmlab.diffusion.dit import Shape, pick, token_grid
from vfmlab.nn.rope import rotary_table, sincos_table
from vfmlab.registry import NETWORKS


class HeadShape(Shape):
    """Size of a transformer, and of the head behind it."""

    head_width: int = Field(2048, ge=8, description="wider than the latents have channels")
    head_depth: int = Field(2, ge=1)
    head_heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)

    @model_validator(mode="after")
    def _head(self) -> Self:
        if self.head_width % (4 * self.head_heads):
            raise ValueError(f"head_width {self.head_width} is not a multiple of 4 x head_heads "
                             f"({4 * self.head_heads})")
        return self


class Split(nn.Module):
    """What networks of an encoder and a head share; a subclass builds their parts and brings `encode`."""

    @property
    def depth(self) -> int:
        """Blocks of encoder and head together, as `features_at` counts them."""
        return len(self.blocks) + len(self.head_blocks)

    def width_at(self, block: int) -> int:
        """Width of the tokens after a block: those of the head are wider."""
        return self.config.sizes[0] if block <= len(self.blocks) else self.config.head_width

    def head(self, x: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the network predicts, B C h w, under the encoder's last `tokens` (B N D), and the tokens after
        each block of the head."""
        # B N wide: a condition per token
        c = F.silu(self.to_head(F.silu(self.time_embed(t).unsqueeze(1) + tokens)))
        h, states = self.head_patch_embed(x).flatten(2).transpose(1, 2), []
        for block in self.head_blocks:
            h = block(h, c, self.head_rope)
            states.append(h)
        return unpatchify(self.final(h, c), self.config.patch, self.grid), states


@NETWORKS.register("ddt")
class DDT(Split):
    """Velocity network with encoder and head; arguments and contract as
    :class:`vfmlab.diffusion.dit.LightningDiT`."""

    class Config(HeadShape):
        kind: str = "ddt"
        qk_norm: bool = Field(False, description="norm of queries and keys; off in RAE")
        swiglu: bool = True
        rope: bool = True
        rmsnorm: bool = Field(True, description="False: layer norm without weights")
        shift_free: bool = Field(False, description="modulation by scale and gate only")
        pos_embed: bool = Field(True,
                                description="add a fixed sine-cosine position code to the encoder's tokens")

    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        width, depth, heads = config.sizes
        channels, wide = latent_shape[0], config.head_width
        self.config, self.latent_shape, self.num_classes = config, tuple(latent_shape), num_classes
        self.grid = token_grid(latent_shape, config.patch)
        norm = "rms" if config.rmsnorm else "layer"
        style = (config.mlp_ratio, norm, config.qk_norm, config.swiglu, config.shift_free)

        self.patch_embed = nn.Conv2d(channels, width, config.patch, config.patch)
        self.time_embed = FourierEmbedding(width)
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads, *style) for _ in range(depth))
        self.to_head = nn.Linear(width, wide) if width != wide else nn.Identity()
        self.head_patch_embed = nn.Conv2d(channels, wide, config.patch, config.patch)
        self.head_blocks = nn.ModuleList(Block(wide, config.head_heads, *style)
                                         for _ in range(config.head_depth))
        self.final = FinalLayer(wide, config.patch**2 * channels, norm)
        places = sincos_table(self.grid, width)[None]
        self.pos_embed = nn.Parameter(places, False) if config.pos_embed else None
        for name, size in {"rope": width // heads, "head_rope": wide // config.head_heads}.items():
            table = rotary_table(self.grid, size) if config.rope else None
            self.register_buffer(name, table, persistent=False)
        initialise(self)

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        """Tokens after the embeddings and each block of the encoder, B N D; arguments as :meth:`forward`."""
        h = self.patch_embed(x).flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        # The release activates the condition, and each block's modulation activates it again; so do we.
        c = F.silu(F.silu(self.time_embed(t) + self.label_embed(y)))
        states = [h]
        for block in self.blocks:
            h = block(h, c, self.rope)
            states.append(h)
        return states

    def forward(self, x: Tensor, t: Tensor, y: Tensor,
                features_at: tuple[int, ...] = ()) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Velocity at noisy latents x (B C h w), times t (B), labels y (B); the head's blocks come last."""
        states = self.encode(x, t, y)
        v, more = self.head(x, t, states[-1])
        return v if not features_at else (v, pick(dict(enumerate(states + more)), features_at))
