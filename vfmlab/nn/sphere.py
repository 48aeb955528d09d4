"""Tokens on a sphere: every place's channels as one vector of a given length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vfmlab.errors import DataError

EPS = 1e-6  # added to a mean square before its root


def mean_length(channels: int) -> float:
    """Mean length of a standard normal vector, sqrt(2) Gamma((C + 1) / 2) / Gamma(C / 2): 31.99 at 1024."""
    return math.sqrt(2) * math.exp(math.lgamma((channels + 1) / 2) - math.lgamma(channels / 2))


def lengths(x: Tensor) -> Tensor:
    """Length of every token of B C h w (or B C) over channels, in its place: B 1 h w."""
    return x.norm(dim=1, keepdim=True)


def onto(x: Tensor, radius: float | Tensor) -> Tensor:
    """Tokens B C h w scaled to length `radius`, at least in fp32; :class:`DataError` for one of no length."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    length = lengths(x)
    zero = (length == 0).flatten(1)
    if bool(zero.any()):
        row, place = (int(k) for k in zero.nonzero()[0])
        raise DataError(f"{int(zero.sum())} tokens have length zero, the first in row {row} at place "
                        f"{place}: they have no direction; look at the encoder, or use "
                        "tokenizer.radius=null with diffusion.path=null")
    return x * (radius / length)


def rms_over_image(x: Tensor, centred: bool = False) -> Tensor:
    """x / rms(x) of B C h w over channels and places of each image, in fp32; centred: their mean taken off
    first."""
    x = x.float()
    x = x - x.mean((1, 2, 3), keepdim=True) if centred else x
    return x * torch.rsqrt(x.square().mean((1, 2, 3), keepdim=True) + EPS)


def rms_over_channels(x: Tensor) -> Tensor:
    """x / rms(x) per token over the channels of B C h w, no weights, in fp32: tokens of length sqrt(C)."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
