"""Spatial structure inside one image: LDS, local against distant similarity.

iREPA ("What matters for representation alignment: global information or spatial structure?", arXiv
2512.10794) defines

    LDS(X) = E[K(t, t') | d(t, t') < r_near] - E[K(t, t') | d(t, t') >= r_far]    (K: cosine of tokens)

Its released evaluation takes the four neighbours as near and a Manhattan distance of at least 6 cells as far,
on a grid of 16 x 16. Here the far bound is the same share of the grid's side, 6/16 (so exactly 6 on that
grid, and ours elsewhere).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import HEADLINE, HIGHER, LATENT, Draft, Quantity
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

FAR = 6 / 16
BLOCK = 64  # images whose token similarities are held at once


def far_bound(h: int, w: int) -> int:
    """Manhattan distance from which two cells of an h x w grid count as far."""
    return max(2, round(FAR * max(h, w)))


@cache
def _pairs(h: int, w: int, far: int) -> tuple[Tensor, Tensor]:
    """Which pairs of cells are neighbours, and which are far: bool T T each."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], 1)
    distance = (place[:, None] - place[None]).abs().sum(-1)
    return distance == 1, distance >= far


def lds(maps: Tensor, far: int | None = None) -> Tensor:
    """Local minus distant cosine similarity of the tokens of each image: N C h w -> N, in [-2, 2].

    far: Manhattan distance from which pairs count as distant; None: 6/16 of the grid's side.

    Raises:
        DataError: a grid without near or without far pairs.
    """
    h, w = maps.shape[-2:]
    far = far_bound(h, w) if far is None else far
    near, distant = _pairs(h, w, far)
    if not near.any() or not distant.any():
        raise DataError(f"a grid of {h} x {w} has no pairs of tokens {far} or more cells apart; LDS needs a "
                        "larger one")
    near, distant, values = near.to(maps.device), distant.to(maps.device), []
    for part in maps.split(BLOCK):
        tokens = F.normalize(part.flatten(2).transpose(1, 2).float(), dim=2)
        alike = tokens @ tokens.transpose(1, 2)  # N T T
        values.append((alike * near).sum((1, 2)) / near.sum() - (alike * distant).sum((1, 2)) / distant.sum())
    return torch.cat(values)


@INSTRUMENTS.register("lds")
class LocalStructure(Instrument):
    """`lds`: mean over images; spread over images."""

    quantities = (Quantity("lds", "LDS", HIGHER, shown=(LATENT, HEADLINE)),)

    def measure(self, subject: Subject, report: Draft) -> None:
        maps = subject.held_out.maps
        values = lds(maps).double()
        facts = {"measure": "local - distant cosine", "near": "four neighbours",
                 "far": far_bound(*maps.shape[-2:])}
        report.mean("lds", values, subject.section(facts))
