"""Differentiable augmentation of real and generated images (DiffAugment, arXiv 2006.10738, section 3).

Every image draws its own numbers; images in [-1, 1], B 3 H W. What leaves the image or is cut out becomes 0
(grey).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vfmlab.seeding import StepRandom

Policy = Literal["colour", "translation", "cutout"]
SHIFT = 1 / 8  # of the side, each way
HOLE = 1 / 2  # of the side


def colour(images: Tensor, rng: StepRandom) -> Tensor:
    """Brightness +-0.5, then saturation x [0, 2), then contrast x [0.5, 1.5)."""
    brightness, saturation, contrast = rng.rand(3, 1, 1, 1).to(images).unbind(1)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * (2 * saturation)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def translation(images: Tensor, rng: StepRandom) -> Tensor:
    """Moved by up to an eighth of the side, in whole pixels."""
    for axis, draw in ((2, rng.rand(1)), (3, rng.rand(1))):
        side = images.shape[axis]
        most = int(side * SHIFT + 0.5)
        move = (draw.to(images.device) * (2 * most + 1)).long() - most  # B 1, in [-most, most]
        source = torch.arange(side, device=images.device) - move  # B side
        shape = [len(images), 1, 1, 1]
        shape[axis] = side
        inside = ((source >= 0) & (source < side)).view(shape)
        index = source.clamp(0, side - 1).view(shape).expand_as(images)
        images = images.gather(axis, index) * inside.to(images)
    return images


def cutout(images: Tensor, rng: StepRandom) -> Tensor:
    """A square of half the side is cut out; its centre is anywhere in the image."""
    keep = torch.zeros(len(images), 1, 1, 1, dtype=torch.bool, device=images.device)
    for axis, draw in ((2, rng.rand(1)), (3, rng.rand(1))):
        side = images.shape[axis]
        hole = int(side * HOLE + 0.5)
        start = (draw.to(images.device) * (side + 1 - hole % 2)).long() - hole // 2  # B 1
        place = torch.arange(side, device=images.device)
        shape = [len(images), 1, 1, 1]
        shape[axis] = side
        keep = keep | ((place < start) | (place >= start + hole)).view(shape)
    return images * keep.to(images)


POLICIES = {"colour": colour, "translation": translation, "cutout": cutout}
