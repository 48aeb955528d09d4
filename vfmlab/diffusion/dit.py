"""LightningDiT: the transformer that predicts the velocity of the latents (arXiv 2501.01423, on DiT, arXiv
2212.09748).

Time and velocity follow `vfmlab.diffusion.path`. Channels and grid are read from the tokenizer's latent
shape, so that a change of tokenizer needs no change here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import SizedConfig
from vfmlab.diffusion.blocks import Block, FinalLayer, LayerNorm, TimeEmbedding, initialise, unpatchify
from vfmlab.errors import ConfigError
from vfmlab.nn.rope import rotary_table, sincos_table
from vfmlab.registry import NETWORKS

SIZES = {  # name: (width, depth, heads), table 1 of DiT
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


class Shape(SizedConfig):
    """Size and patch of a transformer."""

    SIZES = SIZES
    size: Literal["S", "B", "L", "XL"] | None = Field(None, description="DiT's width, depth and heads")
    width: int | None = Field(None, ge=8)
    patch: int = Field(1, ge=1, description="side of a patch in latent pixels")


def token_grid(latent_shape: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """Tokens down and across; :class:`ConfigError` when the latent does not divide."""
    _, height, width = latent_shape
    if height % patch or width % patch:
        raise ConfigError(f"network.patch {patch} does not divide the latent of {height} x {width}; 1 always "
                          "does")
    return height // patch, width // patch


class Joint(NamedTuple):
    """Velocities of the latents (v: B C h w) and of the class token beside them (v_class: B K)."""

    v: Tensor
    v_class: Tensor


@NETWORKS.register("lightningdit")
class LightningDiT(nn.Module):
    """Velocity network on latents.

    Args:
        config: see :class:`Config`. latent_shape: (C, h, w). num_classes: labels are 0 .. num_classes - 1,
            and num_classes itself is the null label of classifier-free guidance.

    With `token` it denoises the class token of a VFM too (REG, arXiv 2507.01467): the noisy token, brought to
    the network's width, goes before those of the latents, without a place of its own. With `text` labels are
    numbers of texts (:mod:`vfmlab.diffusion.prompts`), whose tokens go there and through all blocks (joint
    tokens, as in U-ViT, arXiv 2209.12152); their mean takes the place of the class's vector.
    """

    class Config(Shape):
        kind: str = "lightningdit"
        mlp_ratio: float = Field(4.0, gt=0)
        qk_norm: bool = Field(True, description="norm of queries and keys; keeps bf16 training stable")
        swiglu: bool = True
        rope: bool = True
        rmsnorm: bool = Field(True, description="False: layer norm without weights")
        shift_free: bool = Field(False,
                                 description="modulation by scale and gate only (the release's wo_shift)")
        learn_sigma: bool = Field(False, description="twice the output channels, the second half unused")
        pos_embed: bool = Field(True, description="add a fixed sine-cosine position code")
        token: int | None = Field(None, ge=1, description="width of a class token that is denoised beside "
                                                          "the latents (REG)")
        text: tuple[PositiveInt, PositiveInt] | None = Field(None, description="[tokens, width] of texts "
            "that are the condition in place of classes")

    def __init__(self, config: Config, latent_shape: tuple[int, int, int], num_classes: int):
        super().__init__()
        width, depth, heads = config.sizes
        channels, _, _ = latent_shape
        self.config, self.latent_shape, self.num_classes = config, tuple(latent_shape), num_classes
        self.grid = token_grid(latent_shape, config.patch)
        norm = "rms" if config.rmsnorm else "layer"

        self.patch_embed = nn.Conv2d(channels, width, config.patch, config.patch)
        self.time_embed = TimeEmbedding(width)
        if config.text is None:
            self.label_embed = nn.Embedding(num_classes + 1, width)
        else:
            self.text_embed, self.text_norm = nn.Linear(config.text[1], width), LayerNorm(width, affine=True)
            self.label_embed, self.prompts = nn.Linear(width, width), None
        self.blocks = nn.ModuleList(
            Block(width, heads, config.mlp_ratio, norm, config.qk_norm, config.swiglu, config.shift_free)
            for _ in range(depth)
        )
        self.final = FinalLayer(width, config.patch**2 * channels * (2 if config.learn_sigma else 1), norm)
        places, turns = (
            sincos_table(self.grid, width), rotary_table(self.grid, width // heads) if config.rope else None
        )
        if config.token is not None:
            self.class_embed, self.class_norm = nn.Linear(config.token, width), LayerNorm(width, affine=True)
            self.class_final = nn.Linear(width, config.token)
        # tokens before those of the latents, which have no place
        self.apart = config.text[0] if config.text is not None else int(config.token is not None)
        places = torch.cat([torch.zeros(self.apart, width), places])
        if turns is not None:  # sin 0, cos 1
            still = torch.zeros(self.apart, turns.shape[-1])
            turns = torch.cat([torch.stack([still, still + 1]), turns], dim=1)
        # A parameter without gradient, not a buffer: published parameter counts include it, and releases
        # store it.
        self.pos_embed = nn.Parameter(places[None], False) if config.pos_embed else None
        self.register_buffer("rope", turns, persistent=False)
        initialise(self)
        if config.token is not None:
            nn.init.zeros_(self.class_final.weight)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def width_at(self, block: int) -> int:
        """Width of the tokens after a block."""
        return self.config.sizes[0]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, features_at: tuple[int, ...] = (),
                token: Tensor | None = None) -> Tensor | Joint | tuple[Tensor | Joint, dict[int, Tensor]]:
        """Velocity at noisy latents, and at a noisy class token for networks that have one.

        Args:
            x: B C h w noisy latents. t: B times in [0, 1], 0 = data. y: B labels; num_classes is the null
                label.
            features_at: blocks whose output tokens are wanted: k = after block k, 0 = after the embeddings,
                -1 = after the last block.
            token: B K noisy class token, at the same times, for networks with `config.token` = K. None: its
                mean, zero, which says nothing of the image: so the network is read as one of latents alone.

        Returns:
            v: B C h w, or with a token :class:`Joint` (v, v of the token); with `features_at`, (that, {k: B N
            D}) with N tokens row by row, and the class token before them where one was given.
        """
        if token is not None and self.config.token is None:
            raise ConfigError("this network has no class token to denoise (network.token is null); call it "
                              "without one")
        given, apart = token is not None, self.apart
        if self.config.token is not None and not given:
            token = x.new_zeros(len(x), self.config.token)
        h = self.patch_embed(x).flatten(2).transpose(1, 2)  # B N D
        if token is not None:
            h = torch.cat([self.class_norm(self.class_embed(token)).unsqueeze(1), h], dim=1)
        if self.config.text is not None:
            y = self._read(y)
            h, y = torch.cat([y, h], dim=1), y.mean(1)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        # B D; each block's modulation begins with this SiLU
        c = F.silu(self.time_embed(t) + self.label_embed(y))
        hidden = {0: h}
        for k, block in enumerate(self.blocks, 1):
            h = block(h, c, self.rope)
            hidden[k] = h
        h = self.final.modulated(h, c)
        v = unpatchify(self.final.linear(h[:, apart:]), self.config.patch,
                       self.grid)[:, : self.latent_shape[0]]
        out = Joint(v, self.class_final(h[:, 0])) if given else v
        if not features_at:
            return out
        return out, {k: tokens if given else tokens[:, apart:]
                     for k, tokens in pick(hidden, features_at).items()}


    def _read(self, y: Tensor) -> Tensor:
        """Texts, by number B -> their tokens B L D at the network's width."""
        if self.prompts is None:
            raise ConfigError("this network reads text and has none; set some with "
                              "vfmlab.diffusion.prompts.set_prompts")
        return self.text_norm(self.text_embed(self.prompts(y).to(self.text_embed.weight.dtype)))


def pick(hidden: dict[int, Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
    """The wanted entries under the caller's own keys; negative keys count from the last block."""
    depth = max(hidden)
    for k in wanted:
        if not -depth <= k <= depth:
            raise ConfigError(f"features_at {k}: the network has blocks 1 to {depth} (0: embeddings, -1: the "
                              "last)")
    return {k: hidden[k if k >= 0 else depth + 1 + k] for k in wanted}
