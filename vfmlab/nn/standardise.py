"""Feature maps with zero mean and unit variance, per channel or per channel and place, by statistics that are
measured once and then fixed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST_STD = 1e-5  # a channel that never changes stays at zero


def over(statistic: Tensor, maps: Tensor | None = None) -> Tensor:
    """Mean or std, [C] or [C h w], in the form that meets maps B C h w; one for each place is interpolated
    where `maps` stand on another grid."""
    if statistic.ndim == 1:
        return statistic.view(1, -1, 1, 1)
    if maps is None or maps.shape[-2:] == statistic.shape[-2:]:
        return statistic[None]
    return F.interpolate(statistic[None], maps.shape[-2:], mode="bilinear", align_corners=False)


def channel_moments(maps: Iterable[Tensor], places: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance over all images of `maps` (B C h w each), in float64, in one pass: [C] over places
    too, or [C h w] with `places`."""
    count, mean, m2, axes = 0, torch.zeros(()), torch.zeros(()), (0,) if places else (0, 2, 3)
    for x in maps:
        x = x.double()
        new = x.mean(dim=axes)
        n, delta = x.numel() // new.numel(), new - mean  # Chan's update: exact for batches of any size
        spread = (x - over(new)).square().sum(dim=axes)
        m2 = m2 + spread + delta.square() * (count * n / (count + n))
        mean = mean + delta * (n / (count + n))
        count += n
    return mean, m2 / max(count, 1)


class Standardise(nn.Module):
    """(x - mean) / std of B C h w; mean and std [C], or [C h w] with `places` (h, w), are buffers, 0 and 1
    until :meth:`fit`."""

    def __init__(self, channels: int, places: tuple[int, int] | None = None):
        super().__init__()
        shape = (channels, *(places or ()))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def fit(self, maps: Iterable[Tensor]) -> None:
        """Measure mean and std over all `maps` (B C h w each), in float64."""
        mean, variance = channel_moments(maps, places=self.mean.ndim > 1)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp_min(LEAST_STD))

    def forward(self, x: Tensor) -> Tensor:
        return (x - over(self.mean, x)) / over(self.std, x)

    def inverse(self, x: Tensor) -> Tensor:
        return x * over(self.std, x) + over(self.mean, x)
