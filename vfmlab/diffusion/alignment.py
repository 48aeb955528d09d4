"""Alignment of a diffusion network with a frozen VFM: REPA's projection loss, iREPA's variant of it, REG's
class token.

REPA (arXiv 2410.06940, section 3): the tokens after an early block, seen through a small trained read-out,
should point where the VFM's patch tokens of the clean image point. iREPA (RAEv2's and REPA's successor): the
read-out is one 3x3 convolution, and targets are normalised over places, so that what counts is their spatial
structure. The read-out belongs to the training objective: the network that is saved has none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import Alignment
from vfmlab.diffusion.joint import token_width
from vfmlab.diffusion.sit import readout
from vfmlab.errors import ConfigError


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of each token, mean over tokens: B N D, B N D -> [B] in fp32, 0 (alike) to 2 (opposite)."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean(1)


def spatial_norm(maps: Tensor, share: float = 1.0, eps: float = 1e-6) -> Tensor:
    """(x - share * mean over places) / std over places, channel by channel and image by image; B D h w."""
    return (maps - share * maps.mean((2, 3), keepdim=True)) / (maps.std((2, 3), keepdim=True, correction=0)
                                                               + eps)


def regrid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps B D h' w' on another grid: bilinear, antialiased, so that going to fewer places averages."""
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    return F.interpolate(maps, tuple(grid), mode="bilinear", antialias=True, align_corners=False)


class Projection(nn.Module):
    """REPA's loss: tokens after a block, read out, against a VFM's.

    Args:
        config: see :class:`vfmlab.config.recipe.Alignment`. network: with `features_at`, `depth`, `grid` and
            `width_at(block)`.
        width: of the target's tokens. whole: the target's global token is aligned too, with the network's
            class token, as in REG's release; by MLPs only.

    Raises:
        ConfigError: a network that does not tell what its blocks put out, a block that it does not have.
    """

    def __init__(self, config: Alignment, network: nn.Module, width: int, whole: bool = False):
        super().__init__()
        if not all(hasattr(network, part) for part in ("depth", "grid", "width_at")):
            raise ConfigError(f"alignment: network '{type(network).__name__}' does not tell what its blocks "
                              "put out; use lightningdit, sit or ddt")
        if config.block > network.depth:
            raise ConfigError(f"alignment.block {config.block}: the network has blocks 1 to {network.depth}")
        own = network.width_at(config.block)
        self.config, self.grid, self.prefix = config, tuple(
            network.grid), int(token_width(network) is not None)
        self.whole = whole and config.projector == "mlp"
        if config.projector == "conv":
            self.read: nn.Module = nn.Conv2d(own, width, 3, padding=1)
        else:
            self.read = readout(own, config.hidden, width)

    def on(self, samples: int) -> bool:
        """Whether the loss still acts after `samples` images."""
        return self.config.until is None or samples < self.config.until

    def forward(self, tokens: Tensor, target: Tensor, token: Tensor | None = None) -> Tensor:
        """Distance per image [B], 0 to 2.

        Args:
            tokens: B N D after the block, a class token first where the network has one. target: B K h w maps
            of the VFM on
                the network's grid. token: B K its global token, read where the projection is of the `whole`.
        """
        maps = (
            target.float() if self.config.spatial_norm is None
            else spatial_norm(target.float(), self.config.spatial_norm)
        )
        goal = maps.flatten(2).transpose(1, 2)
        if self.config.projector == "conv":
            places = tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
            return cosine_distance(self.read(places).flatten(2).transpose(1, 2), goal)
        if self.whole:
            return cosine_distance(self.read(tokens), torch.cat([token.float().unsqueeze(1), goal], dim=1))
        return cosine_distance(self.read(tokens[:, self.prefix :]), goal)


class TokenScale(nn.Module):
    """Class tokens to zero mean and unit variance per channel; statistics are part of a run's state."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Channels that do not vary keep their scale."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, token: Tensor) -> Tensor:
        return (token.float() - self.mean) / self.std
