"""A discriminator of steps on the way from noise: is this the clean image of that noisy state?

Epsilon-VAE (arXiv 2410.04081): the pair (estimate, x_t) against the pair (image, x_t), channels concatenated,
with the time in the norms; trained with the non-saturating loss and R1 (`losses.adversarial.loss`, `.r1`).
The network behind it is not specified: here residual blocks that know the time, halved in between (ours).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.decoders.diffusion import State
from vfmlab.errors import ConfigError
from vfmlab.losses.discriminators.base import Discriminator, DiscriminatorConfig, Features
from vfmlab.nn.conv_blocks import group_norm
from vfmlab.nn.unet import TimedBlock, TimeEmbedding
from vfmlab.registry import DISCRIMINATORS

WIDEST = 512


@DISCRIMINATORS.register("trajectory")
class TrajectoryDiscriminator(Discriminator):
    """Images B 3 H W and their noisy states -> logits B 1 h w. Each image is judged by itself."""

    class Config(DiscriminatorConfig):
        kind: Literal["trajectory"] = "trajectory"
        width: int = Field(32, ge=1, description="channels at full resolution; doubled by each level, up to "
                                                 "512")
        layers: int = Field(3, ge=1, description="times that the resolution is halved")

        @field_validator("augment")
        @classmethod
        def _plain(cls, augment: tuple) -> tuple:
            if augment:
                raise ValueError("a pair of image and noisy state is judged as it is; leave augment empty")
            return augment

    def __init__(self, config: TrajectoryDiscriminator.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        widths = [min(config.width * 2**k, WIDEST) for k in range(config.layers + 1)]
        self.embed = TimeEmbedding(config.width)
        self.first = nn.Conv2d(6, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(TimedBlock(a, b, 4 * config.width) for a, b in pairwise(widths))
        self.halve = nn.ModuleList(nn.Conv2d(b, b, 3, 2, 1) for b in widths[1:])
        self.norm, self.out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 1, 3, padding=1)

    def score(self, images: Tensor, labels: Tensor | None,
              state: State | None = None) -> tuple[list[Tensor], Features]:
        if state is None:
            raise ConfigError("discriminator.kind 'trajectory' judges an image beside the noisy state it was "
                              "estimated from, and this tokenizer's decoder has none; use "
                              "tokenizer.method=epsilon_vae, or discriminator.kind=patchgan")
        time, maps = self.embed(state.t), []
        h = self.first(torch.cat([images, state.x.to(images)], dim=1))
        for block, halve in zip(self.blocks, self.halve, strict=True):
            h = halve(block(h, time))
            maps.append(h)
        return [self.out(F.silu(self.norm(h)))], [maps]
