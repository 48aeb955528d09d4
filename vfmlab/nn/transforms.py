"""Scaling and quarter turns of latents and images: equivariance regularisation as pure functions of explicit
choices.

Per batch, one of three things happens (VFM-VAE, arXiv 2510.18457, released config; the idea is EQ-VAE's,
2502.09509):

- latent path: z is scaled and turned before it is decoded, the target image likewise;
- prior path: the image is scaled down *before* it is encoded, and is its own target;
- neither.

Sizes that do not divide: a scale is applied to the side of the latent grid and rounded to the nearest whole
cell (at least one), and the image's side is that many cells times the down-sampling factor. The two therefore
always agree, and the scale that takes effect is `latent_side / full latent side`, which may differ a little
from the one asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.config import Equivariance
from vfmlab.seeding import StepRandom


@dataclass(frozen=True)
class Choice:
    """What happens to one batch. latent_side, image_side: after scaling; turns: clockwise quarter turns, 0 to
    3."""

    path: Literal["none", "latent", "prior"]
    latent_side: int
    image_side: int
    turns: int = 0


def scaled_side(side: int, scale: float) -> int:
    """Cells along a side after scaling: the nearest whole number (halves up), at least 1."""
    return max(1, int(side * scale + 0.5))


def plan(config: Equivariance, rng: StepRandom, latent_side: int, factor: float) -> Choice:
    """Draw what happens to this step's batch; the same on every rank. factor: pixels of a cell's side.

    Always takes the same count of numbers from `rng`, so that what is drawn later does not depend on the
    outcome.
    """
    path, kind, size, turn = rng.number(), rng.number(), rng.number(), rng.number()
    if path < config.p_latent:
        scale = config.scales[min(int(size * len(config.scales)), len(config.scales) - 1)]
        side = scaled_side(latent_side, scale)
        return Choice("latent", side, round(side * factor), min(int(turn * 4), 3))
    smaller = [scale for scale in config.scales if scale < 1]
    if kind < config.p_prior and smaller:
        side = scaled_side(latent_side, smaller[min(int(size * len(smaller)), len(smaller) - 1)])
        return Choice("prior", side, round(side * factor))
    return Choice("none", latent_side, round(latent_side * factor))


def input_images(images: Tensor, choice: Choice) -> Tensor:
    """What is encoded. B 3 H W in [-1, 1] -> B 3 image_side image_side on the prior path, unchanged
    otherwise."""
    return resize(images, choice.image_side) if choice.path == "prior" else images


def latent(z: Tensor, choice: Choice) -> Tensor:
    """What is decoded. B C h w -> B C latent_side latent_side, turned, on the latent path; unchanged
    otherwise."""
    if choice.path != "latent":
        return z
    # Plain bilinear, as in the released code: anti-aliasing would average over more cells.
    return turn(resize(z, choice.latent_side, antialias=False), choice.turns)


def target_images(images: Tensor, choice: Choice) -> Tensor:
    """What the decoded image is compared with. B 3 H W -> B 3 image_side image_side, turned as the latent
    was."""
    return turn(resize(images, choice.image_side), choice.turns)


def resize(x: Tensor, side: int, antialias: bool = True) -> Tensor:
    """B C h w to side x side, bilinear; the very same tensor if it has that size."""
    if x.shape[-2:] == (side, side):
        return x
    return F.interpolate(x.float(), (side, side), mode="bilinear", antialias=antialias, align_corners=False)


def turn(x: Tensor, quarters: int) -> Tensor:
    """Turn the last two axes clockwise by so many quarters."""
    return torch.rot90(x, -quarters, (-2, -1)) if quarters % 4 else x
