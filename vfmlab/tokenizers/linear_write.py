"""The decoder's half of a linear start (linear_start.py), for tokenizers whose latent is fixed before training.

    decoded image = gain * network(z) + B z

B is the ridge regression of the image's patches on 3x3 neighbourhoods of latents. Where training adds noise to the latent,
the ridge is the noise's variance: that is the best linear decoder of noisy latents.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.tokenizers.linear_start import START_GAIN, Moments, rows


class LinearWrite(nn.Module):
    """The linear path of a decoder from `channels` to factor x factor patches; zero until :meth:`solve`."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.write = nn.Conv2d(channels, 3 * factor**2, 3, padding=1)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)
        self.gain = nn.Parameter(torch.full((3, 1, 1), START_GAIN))

    def forward(self, images: list[Tensor], z: Tensor) -> list[Tensor]:
        """The network's images, largest first -> those with the linear path added (averaged down for smaller ones)."""
        own = F.pixel_shuffle(self.write(z), self.factor)
        return [self.gain * image + F.adaptive_avg_pool2d(own, image.shape[-2:]) for image in images]

    @torch.no_grad()
    def solve(self, pairs: Iterable[tuple[Tensor, Tensor]], noise: float = 0.0) -> None:
        """Set B from pairs of images B 3 H W and raw latents B C h w. noise: variance that training adds to latents."""
        moments = Moments()
        for images, z in pairs:
            around = F.unfold(z.float(), 3, padding=1).transpose(1, 2).flatten(0, 1)  # (B h w) (C 3 3)
            moments.add(around, rows(F.pixel_unshuffle(images.float(), self.factor)))
        back = moments.ridge(noise or None)
        self.write.weight.copy_(back.T.reshape(self.write.weight.shape))
        self.write.bias.copy_(moments.mean_y - moments.mean_x @ back)
