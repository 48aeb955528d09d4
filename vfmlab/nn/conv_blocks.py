"""Convolutional building blocks of the latent-diffusion autoencoder (Rombach et al., arXiv 2112.10752,
appendix D).

Pre-activation residual blocks (GroupNorm, SiLU, 3x3), single-head self-attention over pixels, strided
convolutions down, nearest-neighbour up-sampling. GroupNorm takes 32 groups where the width allows it, else as
many as divide it.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError
from vfmlab.nn.attention import attend

USUAL = {1: (1,), 2: (1, 2), 3: (1, 2, 4), 4: (1, 2, 4, 4), 5: (1, 1, 2, 2, 4), 6: (1, 1, 2, 2, 4, 4)}


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with gcd(32, channels) groups."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), 1x1 shortcut where widths differ. B C h w -> B C' h w."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """x + proj(attention(norm(x))) over all pixels, one head as wide as the layer. B C h w -> same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # B 1 hw C
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        out = attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj(out)


class Down(nn.Module):
    """3x3 convolution with stride s; zero padding right and below only, as published weights expect."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        # A kernel smaller than the stride would never look at some pixels.
        kernel = max(3, stride)
        self.pad = kernel - stride
        self.conv = nn.Conv2d(width, width, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, self.pad, 0, self.pad)))


class Up(nn.Module):
    """Nearest-neighbour up-sampling by s, then a 3x3 convolution."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=float(self.stride), mode="nearest"))


class Stage(nn.Module):
    """Residual blocks at one resolution, each with attention if asked for, then a change of resolution."""

    def __init__(self, width: int, out: int, blocks: int, attention: bool, resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(width if i == 0 else out, out) for i in range(blocks))
        self.attentions = nn.ModuleList(Attention(out) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Middle(nn.Module):
    """Residual block, attention (optional), residual block, at the latent's resolution."""

    def __init__(self, width: int, attention: bool):
        super().__init__()
        self.block1, self.block2 = ResBlock(width, width), ResBlock(width, width)
        self.attention = Attention(width) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(x)))


def strides(factor: int) -> list[int]:
    """Prime factors of the down-sampling factor, smallest first: 16 -> [2, 2, 2, 2], 14 -> [2, 7]."""
    factors, prime = [], 2
    while factor > 1:
        while factor % prime == 0:
            factors.append(prime)
            factor //= prime
        prime += 1
    return factors


def levels(width: int, multipliers: tuple[int, ...] | None, factor: int, where: str) -> list[int]:
    """Width of each resolution, finest first: one more than there are strides in `factor`.

    multipliers None: (1, 1, 2, 2, 4) for f16, (1, 2, 4, 4) for f8, (1, 2, 4) for f4, ...; of a shorter tuple
    the last entry holds for all further resolutions, so that one config serves several factors.
    """
    needed = len(strides(factor)) + 1
    if multipliers is None:
        multipliers = USUAL.get(needed) or (1,) * (needed - len(USUAL[6])) + USUAL[6]
    multipliers = multipliers + multipliers[-1:] * (needed - len(multipliers))
    if len(multipliers) != needed:
        raise ConfigError(f"{where}.multipliers {list(multipliers)} has {len(multipliers)} entries; factor "
                          f"{factor} (over 'patch') has {needed} resolutions, give at most one multiplier "
                          "for each")
    return [width * multiplier for multiplier in multipliers]


class ConvEncoder(nn.Module):
    """Images B 3 H W -> B out H/factor W/factor.

    Args:
        attention: sides in pixels, at images of side `size`, at which attention follows every residual block.
        patch: the image is pixel-unshuffled by it first, leaving out the costly finest. first: channels after
        the first convolution; None: those of the finest resolution.
    """

    def __init__(
        self, out: int, factor: int, size: int, widths: list[int], blocks: int, attention: tuple[int, ...],
        middle: bool = True, middle_attention: bool = True, patch: int = 1, first: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.patch = patch
        side, width, stages = size // patch, first or widths[0], []
        self.conv_in = nn.Conv2d(3 * patch**2, width, 3, padding=1)
        steps = [*strides(factor // patch), None]
        for target, stride in zip(widths, steps, strict=True):
            resample = Down(target, stride) if stride else None
            stages.append(Stage(width, target, blocks, side in attention, resample))
            width, side = target, side // (stride or 1)
        self.stages = nn.ModuleList(stages)
        self.middle = Middle(width, middle_attention) if middle else nn.Identity()
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        x = self.conv_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class ConvUpsampler(nn.Module):
    """The mirror image: B in h w -> B 3 h*factor w*factor. As :class:`ConvEncoder`; `widths` finest first."""

    def __init__(
        self, inner: int, factor: int, size: int, widths: list[int], blocks: int, attention: tuple[int, ...],
        middle: bool = True, middle_attention: bool = True, patch: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.patch = patch
        side, width, stages = size // factor, widths[-1], []
        self.conv_in = nn.Conv2d(inner, width, 3, padding=1)
        self.middle = Middle(width, middle_attention) if middle else nn.Identity()
        steps = [*reversed(strides(factor // patch)), None]
        for target, stride in zip(reversed(widths), steps, strict=True):
            resample = Up(target, stride) if stride else None
            stages.append(Stage(width, target, blocks, side in attention, resample))
            width, side = target, side * (stride or 1)
        self.stages = nn.ModuleList(stages)  # coarsest first
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3 * patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for stage in self.stages:
            x = stage(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x
