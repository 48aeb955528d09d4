"""Straight lines between two points, and the shape of a path of images."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.errors import DataError


def between(a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Points on the straight lines from a to b (P C h w each), ends included: P steps + 1 C h w."""
    share = torch.linspace(0, 1, steps + 1).view(1, -1, *[1] * (a.ndim - 1))
    return torch.lerp(a[:, None], b[:, None], share)


def path_shape(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Length and roughness of paths of images P T C H W: (P, P).

    Length: sum of the steps' distances over the distance of the ends, 1 for a straight even or uneven line.
    Roughness: sum of second differences over sum of first differences, 0 for an even straight line.

    Raises:
        DataError: fewer than 3 frames, or ends that coincide.
    """
    if frames.shape[1] < 3:
        raise DataError(f"a path of {frames.shape[1]} images has no second differences; take at least 3")
    x = frames.double().flatten(2)
    steps = (x[:, 1:] - x[:, :-1]).norm(dim=2).sum(1)
    bends = (x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]).norm(dim=2).sum(1)
    ends = (x[:, -1] - x[:, 0]).norm(dim=1)
    if not (ends > 0).all():
        raise DataError("the ends of an interpolation decode to the same image; its length is undefined")
    return steps / ends, bends / steps
