"""Augmentations of whole batches, drawn from the step's random numbers: the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.seeding import StepRandom


def chance(rng: StepRandom, p: float) -> Tensor:
    """True with probability p, bool B 1 1 1."""
    return rng.rand(1, 1, 1) < p


def colour(images: Tensor, rng: StepRandom, p: float,
           strength: float = 0.35) -> tuple[Tensor, Tensor, Tensor]:
    """Mix the colour channels: y = A x + b per image. Returns images, A (B 3 3) and b (B 3), so that colours
    that are targets can be carried along."""
    on = chance(rng, p).float().squeeze(-1)  # B 1 1
    eye = torch.eye(3, device=images.device)
    mix = eye + on * strength * rng.randn(3, 3) / 3**0.5
    mix = mix / mix.sum(dim=2, keepdim=True).clamp_min(0.5) * (1 + on * strength * (rng.rand(1, 1) - 0.5))
    shift = (on * strength * 0.5 * rng.randn(3, 1)).squeeze(-1)
    return torch.einsum("bij,bjhw->bihw", mix, images) + shift[:, :, None, None], mix, shift


def blur(images: Tensor, rng: StepRandom, p: float, most: float) -> Tensor:
    """Gaussian blur with a standard deviation drawn from [0.3, most] pixels, 7 taps, reflected edges."""
    b, c, h, w = images.shape
    sigma = 0.3 + (most - 0.3) * rng.rand(1)
    taps = torch.arange(-3, 4, device=images.device, dtype=images.dtype)
    kernel = torch.softmax(-0.5 * (taps / sigma) ** 2, dim=1)
    kernel = torch.where(rng.rand(1) < p, kernel, (taps == 0).to(kernel))
    flat = kernel[:, None, :].expand(b, c, 7).reshape(b * c, 1, 7)
    x = F.pad(images, (3, 3, 3, 3), mode="reflect").reshape(1, b * c, h + 6, w + 6)
    x = F.conv2d(x, flat[:, :, :, None], groups=b * c)
    return F.conv2d(x, flat[:, :, None, :], groups=b * c).view(b, c, h, w)


def noise(images: Tensor, rng: StepRandom, p: float, most: float) -> Tensor:
    """Gaussian noise with a standard deviation drawn from [0, most] (images span [-1, 1])."""
    sigma = most * rng.rand(1, 1, 1) * chance(rng, p)
    return images + sigma * rng.randn(*images.shape[1:])


def zoom(images: Tensor, rng: StepRandom, p: float, most: float, shift: float = 0.0) -> Tensor:
    """Cut a window at most `most` times smaller and bring it to full size; move it by up to `shift` sides."""
    on = chance(rng, p).float().view(-1, 1)
    scale = 1 - on * rng.rand(1) * (1 - 1 / most)
    centre = (2 * rng.rand(2) - 1) * (1 - scale + on * shift)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale.squeeze(1)
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
