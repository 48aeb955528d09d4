"""Up-sampling by two: pixel-shuffle with a fixed blur, or nearest neighbour; and the blur itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.depthwise import DepthwiseConv
from vfmlab.nn.norms import group_norm
from vfmlab.nn.pointwise import PointwiseConv


class BinomialBlur(nn.Module):
    """Binomial low-pass of `taps` taps a side (3: 1 2 1; 5: 1 4 6 4 1), replicate padding. B C H W."""

    def __init__(self, taps: int):
        super().__init__()
        row = torch.tensor([math.comb(taps - 1, k) for k in range(taps)], dtype=torch.float32)
        self.register_buffer("row", row / row.sum(), persistent=False)
        self.taps = taps

    def forward(self, x: Tensor) -> Tensor:
        channels, radius = x.shape[1], self.taps // 2
        kernel = torch.outer(self.row, self.row).to(x.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(replicate(replicate(x, radius, -1), radius, -2), kernel, groups=channels)


def replicate(x: Tensor, radius: int, dim: int) -> Tensor:
    """`x` with its first and last slices repeated `radius` times. F.pad's backward is one that compilers
    refuse."""
    size = [-1] * x.ndim
    size[dim] = radius
    last = x.shape[dim] - 1
    return torch.cat([x.narrow(dim, 0, 1).expand(size), x, x.narrow(dim, last, 1).expand(size)], dim)


class ShuffleUpsample(nn.Module):
    """GroupNorm -> depthwise 3x3 -> 1x1 -> pixel-shuffle -> blur (taps; 0: none). B C H W -> B C' 2H 2W.

    norm_after: the norm follows the shuffle, as in a decoder's first block, whose input is fresh from a norm.
    """

    def __init__(self, inputs: int, outputs: int, taps: int = 0, norm_after: bool = False):
        super().__init__()
        self.norm_after = norm_after
        self.norm = group_norm(outputs if norm_after else inputs)
        self.depthwise = DepthwiseConv(inputs, 3, bias=False)
        self.pointwise = PointwiseConv(inputs, 4 * outputs, bias=False)
        self.blur = BinomialBlur(taps) if taps else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm_after else self.norm(x)
        x = F.pixel_shuffle(self.pointwise(self.depthwise(x)), 2)
        return self.blur(self.norm(x) if self.norm_after else x)


class NearestUpsample(nn.Module):
    """Nearest neighbour, 3x3 convolution, blur (taps; 0: none), as SD-VAE. B C H W -> B C' 2H 2W."""

    def __init__(self, inputs: int, outputs: int, taps: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.blur = BinomialBlur(taps) if taps else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.blur(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
