"""A decoder that denoises (Epsilon-VAE, arXiv 2410.04081): from noise to an image in one to three steps,
under the latent.

    x_t = (1 - t) g x + t n;  the network sees x_t at unit spread and the latent, up-sampled, and predicts v =
    n - g x times of decoding: rho(i / N), which crowd at noise

g (gamma) scales the image against the noise. How the paper undoes it is not said: here the estimate x_t - t v
is divided by g (ours). Noise is drawn for each image by itself, from a seed, so that an image is a function
of its latent and its seed whatever stands beside it in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config
from vfmlab.diffusion import path
from vfmlab.errors import ConfigError
from vfmlab.nn.unet import UNet
from vfmlab.registry import DECODERS
from vfmlab.seeding import SampleRandom, StepRandom


def log_grid(steps: int, m: float = 1.0, n: float = 100.0) -> list[float]:
    """steps + 1 times from noise to data: [log m - log(t (m - n) + n)] / (log m - log n) at t = i / steps."""
    whole = math.log(m) - math.log(n)
    return [(math.log(m) - math.log(i / steps * (m - n) + n)) / whole for i in range(steps + 1)]


class State(NamedTuple):
    """Images on their way to noise. x: B 3 H W. t: B in [0, 1], 1 is noise."""

    x: Tensor
    t: Tensor


class Denoised(NamedTuple):
    """One training forward. image: the estimate of the clean image, B 3 H W. error: of the velocity, squared,
    per image B. state: what the estimate is of."""

    image: Tensor
    error: Tensor
    state: State


@DECODERS.register("diffusion")
class DiffusionDecoder(nn.Module):
    """`forward(z, seeds)`: raw latents B C h w -> [images B 3 h*f w*f]; seeds: one for each image, default 0.

    Args:
        config: see `Config`. latent_channels, latent_side: of z. size: side of the images in pixels.
    """

    last = "net.conv_out.weight"

    class Config(config.DecoderConfig):
        kind: Literal["diffusion"] = "diffusion"
        base: int = Field(64, ge=8, description="width of the finest level: 64 (B), 96 (M), 128 (L), 256 (H)")
        multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1, description="of the levels, "
                                                                                        "finest first")
        blocks: int = Field(2, ge=1, description="residual blocks of each level")
        steps: int = Field(3, ge=1, description="of decoding; more than 3 are worse in the paper")
        gamma: float = Field(0.6, gt=0, le=1, description="scale of the image against the noise")
        spread: float = Field(0.5, gt=0, description="std of pixels, by which the state is brought to unit "
                                                     "spread")

    def __init__(self, config: DiffusionDecoder.Config, latent_channels: int, latent_side: int, size: int):
        super().__init__()
        levels = 2 ** (len(config.multipliers) - 1)
        if size % latent_side or size % levels:
            raise ConfigError(f"decoder.multipliers {list(config.multipliers)}: {size} px from a "
                              f"{latent_side} px latent "
                              f"must divide by {levels} and by the latent's side; give fewer levels")
        self.config, self.factor = config, size // latent_side
        self.net = UNet(3 + latent_channels, 3, config.base, config.multipliers, config.blocks)

    def velocity(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predicted dx/dt at states x (B 3 H W) and times t (B) under latents z."""
        c, s = self.config, t.view(-1, 1, 1, 1)
        unit = x / ((1 - s).square() * (c.gamma * c.spread) ** 2 + s.square()).sqrt()
        wide = F.interpolate(z, x.shape[-2:], mode="nearest")
        return self.net(torch.cat([unit.to(z.dtype), wide], dim=1), t).float()

    def estimate(self, x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
        """The clean image of a state and its velocity: path's estimate over gamma."""
        return path.clean(x, v, t) / self.config.gamma

    def denoise(self, z: Tensor, images: Tensor, rng: StepRandom) -> Denoised:
        """A training forward on clean images, at logit-normal times."""
        noise, t = rng.randn(*images.shape[1:]), torch.sigmoid(rng.randn())
        point = path.interpolate(self.config.gamma * images.float(), noise, t)
        v = self.velocity(point.x, t, z)
        state = State(point.x, t)
        return Denoised(self.estimate(point.x, v, t), path.velocity_loss(v, point.v), state)

    def forward(self, z: Tensor, seeds: Sequence[int] | None = None) -> list[Tensor]:
        side = [n * self.factor for n in z.shape[-2:]]
        if seeds is None:
            seeds = [0] * len(z)
        if len(seeds) != len(z):
            raise ConfigError(f"{len(seeds)} seeds for {len(z)} latents; give one for each image, or none")
        x = SampleRandom(0, seeds, z.device).randn(3, *side)
        for t, s in pairwise(log_grid(self.config.steps)):
            v = self.velocity(x, torch.full((len(x),), t, device=x.device), z)
            image, x = self.estimate(x, v, t), x + (s - t) * v
        return [image]
