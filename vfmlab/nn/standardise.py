"""Feature maps with zero mean and unit variance per channel, by statistics that are measured once and then
fixed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

LEAST_STD = 1e-5  # a channel that never changes stays at zero


def channel_moments(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] over all images and places of `maps` (B C h w each), in float64, in one pass."""
    count, mean, m2 = 0, torch.zeros(()), torch.zeros(())
    for x in maps:
        x = x.double()
        n, new = x.numel() // x.shape[1], x.mean(dim=(0, 2, 3))
        delta = new - mean  # Chan's update: exact for batches of any size, no cancellation
        spread = (x - new.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))
        m2 = m2 + spread + delta.square() * (count * n / (count + n))
        mean = mean + delta * (n / (count + n))
        count += n
    return mean, m2 / max(count, 1)


class Standardise(nn.Module):
    """(x - mean) / std per channel of B C h w; mean and std [C] are buffers, 0 and 1 until :meth:`fit`."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @torch.no_grad()
    def fit(self, maps: Iterable[Tensor]) -> None:
        """Measure mean and std over all images and places of `maps` (B C h w each), in float64."""
        mean, variance = channel_moments(maps)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp_min(LEAST_STD))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
